"""Exact sums of spike counts times weight codes: the same pre-activations in every number format."""

import contextlib
import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qsd
from qsd import operands
from qsd.layers import QuantConv2d, QuantLinear, SpikeMaxPool2d, TokenMeanLinear, largest_sums
from qsd.layers.integer_operands import has_counts_of_float32, inner_layers
from qsd.layers.weights import weight_codes
from qsd.neurons import LsqNeuron, SpikeNeuron
from qsd.spiking.counts import named_calls, watch_neurons
from qsd.tasks import ClassificationTask
from qsd.tasks.guards import PrecisionNote
from tests.helpers.networks import NAMES, randomize_norms, randomize_steps, small

HALF = (torch.bfloat16, torch.float16)
# Channels, groups, kernel, stride, padding, dilation, padding mode.
GEOMETRIES = [
    (6, 1, 1, 1, 0, 1, "zeros"),
    (6, 1, 1, 2, 0, 1, "zeros"),
    (6, 1, 3, 1, 1, 1, "zeros"),
    (6, 2, (3, 2), (2, 1), (2, 0), (1, 2), "zeros"),
    (6, 6, 7, 1, 3, 1, "zeros"),
    (6, 1, 3, 1, "same", 2, "zeros"),
    (6, 3, 3, 1, 1, 1, "reflect"),
]


def autocast(dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def integer_convolution(counts, codes, layer):
    """The convolution in 64-bit integers, one position of the kernel after the other."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(counts.double(), layer._reversed_padding_repeated_twice, mode=mode).numpy().astype(np.int64)
    w = codes.double().numpy().astype(np.int64)
    (rows, columns), (down, right), (below, beside) = layer.kernel_size, layer.stride, layer.dilation
    height = (x.shape[2] - below * (rows - 1) - 1) // down + 1
    width = (x.shape[3] - beside * (columns - 1) - 1) // right + 1
    out = np.zeros((len(x), len(w), height, width), np.int64)
    channels, outputs = w.shape[1], len(w) // layer.groups
    for o in range(len(w)):
        seen = x[:, o // outputs * channels :][:, :channels]
        for i in range(rows):
            for j in range(columns):
                part = seen[:, :, i * below :: down, j * beside :: right][:, :, :height, :width]
                out[:, o] += np.einsum("bchw,c->bhw", part, w[o, :, i, j])
    return torch.from_numpy(out)


def test_sums_are_those_of_64_bit_integers_in_every_format():
    generator = torch.Generator().manual_seed(0)
    for channels, groups, kernel, stride, padding, dilation, mode in GEOMETRIES:
        layer = QuantConv2d(channels, 6, kernel, stride, padding, groups, weight_bits=8, dilation=dilation).eval()
        layer.padding_mode = mode
        counts = torch.randint(128, (2, channels, 9, 8), generator=generator).float()
        for x in (counts, counts.contiguous(memory_format=torch.channels_last)):
            with torch.no_grad():
                codes = weight_codes(layer, torch.float32)
                expected = integer_convolution(x, codes, layer)
                assert torch.equal(layer._conv_forward(x, codes, None).long(), expected)
                pads = layer._reversed_padding_repeated_twice
                padded = F.pad(x, pads, mode="constant" if mode == "zeros" else mode)
                for dtype in (torch.float32, *HALF):
                    sums = operands.convolved(padded.to(dtype), codes.to(dtype), layer.stride, layer.dilation, groups)
                    assert sums.dtype == torch.float32
                    assert torch.equal(sums.long(), expected), (kernel, dtype)


@torch.no_grad()
def test_pre_activations_are_the_same_bits_in_every_format_and_near_those_of_decoded_operands():
    layers = [
        (QuantConv2d(4, 5, 3, padding=1, bias=True), (2, 4, 6, 6)),
        (QuantConv2d(4, 4, 3, padding="same", groups=4, weight_bits=8), (2, 4, 6, 6)),
        (QuantLinear(4, 5, weight_bits=2), (2, 3, 4)),
        (TokenMeanLinear(4, 5), (2, 4, 20, 20)),
        (nn.Sequential(SpikeMaxPool2d(2), QuantConv2d(4, 5, 1, bias=True)), (2, 4, 6, 6)),
    ]
    for neuron in (SpikeNeuron(3), SpikeNeuron(255, 0.02, 1.0), LsqNeuron(7)):
        for layer, shape in layers:
            model, x = nn.Sequential(neuron, layer).eval(), torch.randn(shape)
            if isinstance(layer, QuantLinear):
                nn.init.normal_(layer.bias)
            qsd.set_integer_operands(model, False)
            plain = model(x)
            qsd.set_integer_operands(model)
            exact = model(x)
            torch.testing.assert_close(exact, plain, rtol=1e-5, atol=1e-5)
            for dtype in HALF:
                with torch.inference_mode(), autocast(dtype):
                    result = model(x)
                assert result.dtype == torch.float32
                assert torch.equal(result, exact), (neuron, layer)


def trained(name):
    """With norms, step sizes and scales that are no round numbers."""
    model = randomize_norms(small(name))
    return randomize_steps(model, 0.7, 1.3).eval()


def counts_of_all(model, images, dtype=None):
    look = watch_neurons(model, lambda neuron, *inputs: neuron.counts(*inputs).float())
    with torch.inference_mode(), autocast(dtype), look as calls:
        logits = model(images)
    return {**named_calls(calls), "logits": logits.float()}


@pytest.mark.parametrize(
    ("name", "setting"), [("csdformer_4_256", True), ("e_spikeformer_tiny", True), ("qsd_tiny", "all")]
)
def test_networks_have_all_counts_of_float32_under_autocast(name, setting):
    torch.manual_seed(0)
    name = next(n for n in NAMES if n.startswith(name))
    model, images = trained(name), torch.randn(2, 3, 32, 32)
    exact = {}
    for enable in (False, setting):
        qsd.set_integer_operands(model, enable)
        exact = counts_of_all(model, images)
        changed = []
        for dtype in HALF if enable else HALF[:1]:
            counts = counts_of_all(model, images, dtype)
            changed.append(any(not torch.equal(c, exact[n]) for n, c in counts.items()))
        assert set(changed) == {not enable}
        assert has_counts_of_float32(model) == bool(enable)
    assert sum(bool(c.any()) for c in exact.values()) > len(exact) / 2


@pytest.mark.parametrize("training", [False, True])
def test_layers_that_see_counts_are_exact_in_a_network_with_inner_layers(training):
    model, images, seen = trained("qsd_tiny").train(training), torch.randn(2, 3, 32, 32), []
    qsd.set_integer_operands(model)
    assert not has_counts_of_float32(model)
    inner = {id(layer) for layer in inner_layers(model)}

    def compare(layer, inputs, output):
        if operands.counts_of(*inputs) is not None:
            with torch.autocast("cpu", enabled=False):
                again = type(layer).forward(layer, *inputs)
            assert torch.equal(again, output)
            seen.append(layer)

    layers = [m for m in model.modules() if isinstance(m, QuantConv2d | QuantLinear)]
    for layer in layers:
        layer.register_forward_hook(compare)
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        model(images)
    assert {id(layer) for layer in layers} - {id(layer) for layer in seen} == inner | {id(layers[0])}


def changes():
    """Changes between a neuron and a layer: in place, of a view, of a part; and none."""
    return {
        "whole": lambda x: x.mul_(1.5),
        "view": lambda x: x.flatten(1).add_(0.1),
        "part": lambda x: x[:, 1:].zero_().add_(0.3),
        "other": lambda x: x.clone().mul_(1.5),
        "none": lambda x: x,
    }


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_behind_the_neuron_is_seen(mode):
    neuron, layer = LsqNeuron(4), QuantConv2d(4, 5, 3)
    model = nn.Sequential(neuron, layer).eval()
    for name, change in changes().items():
        for take in (lambda x: x, lambda x: x.transpose(2, 3), lambda x: x[1:, :, ::2]):
            x = torch.randn(2, 4, 12, 12)
            with mode():
                qsd.set_integer_operands(model)
                spikes = neuron(x)
                whole = change(spikes)
                spikes = take(whole if name == "other" else spikes)
                found = layer(spikes)
                assert (operands.counts_of(spikes) is not None) == (name == "none")
                qsd.set_integer_operands(model, False)
                torch.testing.assert_close(found, layer(spikes.clone()))
    del spikes, whole
    gc.collect()
    assert not operands._NOTES, "counts outlive the output of their neuron"


@torch.no_grad()
def test_weights_that_change_have_other_codes():
    model = nn.Sequential(SpikeNeuron(4), QuantLinear(3, 2)).eval()
    qsd.set_integer_operands(model)
    x = torch.rand(5, 3)
    for change in (lambda: model[1].weight.mul_(-0.5), lambda: model[1].quantizer.step.mul_(1.3)):
        model(x)
        change()
        exact = model(x)
        qsd.set_integer_operands(model, False)
        torch.testing.assert_close(exact, model(x))
        qsd.set_integer_operands(model)


@torch.no_grad()
def test_the_bound_is_reached_and_layers_beyond_it_compute_in_float32():
    for inputs, exact in ((1032, True), (1033, False)):  # 1032 * 127 * 128 < 2**24 < 1033 * 127 * 128
        layer = QuantLinear(inputs, 1, weight_bits=8).eval()
        layer.weight.fill_(-1e3)
        layer.quantizer.step.fill_(0.5)
        bound = largest_sums(layer, 127)[""]
        counts = torch.full((1, inputs), 127, dtype=torch.int64)
        assert bound == (-(counts @ weight_codes(layer, torch.float32).long().t()).item(), exact)
        model = nn.Sequential(SpikeNeuron(127, 1.0), layer)
        qsd.set_integer_operands(model)
        with autocast(torch.bfloat16):
            found = model(counts.float())
        if exact:
            assert found.item() == -0.5 * bound.bound
        else:
            assert torch.equal(found, F.linear(counts.float(), layer.quantizer(layer.weight), layer.bias))


def gradients(model, x, cotangent):
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    output.backward(cotangent.to(output.dtype))
    return [output.detach(), x.grad, *(p.grad for p in model.parameters())]


def test_training_has_the_sums_of_evaluation_and_the_gradients_of_decoded_operands():
    cotangent = torch.randn(2, 5, 3, 3).bfloat16().float()  # the same under autocast
    for neuron, lean in ((SpikeNeuron(3), True), (SpikeNeuron(3), False), (LsqNeuron(7), True), (LsqNeuron(7), False)):
        model = nn.Sequential(neuron, SpikeMaxPool2d(2), QuantConv2d(4, 5, 3, padding=1, bias=True))
        x = torch.randn(2, 4, 6, 6)
        qsd.set_lean(model, lean)
        for dtype in (None, torch.bfloat16):
            with autocast(dtype):
                qsd.set_integer_operands(model, False)
                _, *expected = gradients(model, x, cotangent)
                qsd.set_integer_operands(model)
                output, *found = gradients(model, x, cotangent)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            with torch.no_grad():
                assert torch.equal(model.eval()(x), output)
            model.train()


def test_float64_stays_as_it_is_and_other_settings_are_refused():
    model, x = nn.Sequential(SpikeNeuron(3), QuantConv2d(4, 5, 3)).double(), torch.rand(2, 4, 6, 6).double()
    results = []
    for enable in (False, True):
        qsd.set_integer_operands(model, enable)
        with torch.no_grad():
            plain = model(x)
        results.append([plain, *gradients(model, x, torch.ones(2, 5, 4, 4))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(qsd.QsdError, match="integer_operands='yes' is unknown; use true, false or 'all'"):
        qsd.set_integer_operands(model, "yes")


def test_a_configuration_switches_it_on_and_evaluation_then_needs_no_warning(recwarn):
    arguments = {"embed_dims": 32, "num_heads": 4, "depth": 1}
    for enable in (True, False):
        task = ClassificationTask("csdformer_4_256", model_args=arguments, num_classes=3, integer_operands=enable)
        task.configure_model()
        assert has_counts_of_float32(task) == enable
        PrecisionNote().on_validation_start(SimpleNamespace(precision="bf16-mixed"), task)
        assert any("autocast" in str(warning.message) for warning in recwarn) == (not enable)
