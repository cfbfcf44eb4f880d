"""The kernels in Triton's interpreter, on a processor, against PyTorch's operators."""

from itertools import product

import pytest
import torch
from torch import nn

from qsd import QsdError, functional, lean, set_lean
from qsd.functional import CountRule
from qsd.kernels import switch
from qsd.layers import QuantConv2d, SepConv
from qsd.lean.codes import fire
from qsd.lean.memory import flat
from qsd.lsq import lsq_quantize
from qsd.neurons import LsqNeuron, SpikeNeuron
from tests.helpers.kernels import assert_no_further, interpreted, through_two_norms

TYPES = (torch.float32, torch.float16, torch.bfloat16)
RULES = (CountRule(), CountRule(closed=True), CountRule(half_even=True, closed=True))
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.fixture
def kernels(monkeypatch):
    """Let kernels compute on processors, in the interpreter; calls switch between them and PyTorch."""
    interpreted(monkeypatch)
    return lambda on: monkeypatch.setattr(switch, "devices", frozenset(["cpu"] if on else []))


def both(kernels, compute):
    results = []
    for on in (False, True):
        kernels(on)
        results.append(compute())
    return results


def same(a, b):
    """Bit by bit, strides included."""
    kind = INTEGERS[a.dtype]
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a.view(kind), b.view(kind))


def tensors(dtype, time_steps, generator):
    """Inputs with ties, of the memory formats that occur, and their neighbours in the type."""
    x = torch.randn(2, 3, 5, 7, generator=generator).mul_(0.7).add_(0.4)
    x.view(-1)[:64] = torch.arange(-10, 54) / (2 * time_steps)  # exact ties
    x = x.to(dtype)
    return x, x.contiguous(memory_format=torch.channels_last), x[:, :, ::2, 1:], x[:1, :1, :1, :1].expand(1, 2, 1, 1)


def cotangent(like):
    """A gradient in the order of the memory of a dense tensor."""
    return torch.linspace(-1, 1, like.numel()).to(like).as_strided(like.shape, like.stride())


def gradients(function, x, *parameters):
    leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, cotangent(output))


@pytest.mark.parametrize("package", [functional, lean])
def test_neurons_with_a_fixed_threshold(kernels, package):
    generator = torch.Generator().manual_seed(1)
    neurons = [(4, None, 0.25), (3, 36.0, 2 / 3), (7, 0.3, 1.0), (8, None, 0.125), (127, 0.01, 0.01), (1, 1.0, 1.0)]
    for dtype, (index, neuron) in product(TYPES, enumerate(neurons)):
        rule, scale = RULES[index % 3], 1.0 if neuron[1] != 36 else 100.0
        x = tensors(dtype, neuron[0], generator)[index % 4] * scale
        plain, fused = both(kernels, lambda: gradients(lambda x: package.fixed_spikes(x, *neuron, rule), x))
        if rule.half_even:  # PyTorch's rounding leaves the sign of a negative zero
            plain = plain[0] + 0.0, plain[1]
        assert same(plain[0], fused[0]), (dtype, neuron, rule)
        assert same(plain[1], fused[1]), (dtype, neuron, rule)


def test_codes_are_those_of_pytorch_and_are_decoded_and_compared(kernels):
    generator = torch.Generator().manual_seed(2)
    for dtype, (time_steps, index) in product(TYPES, ((4, 0), (7, 1), (127, 2), (3, 3))):
        x = tensors(dtype, time_steps, generator)[index]
        amplitude = torch.tensor(0.3) if index % 2 else 1 / time_steps
        plain, fused = both(kernels, lambda: fire(x, time_steps, None, amplitude))
        assert same(plain[0], fused[0])
        assert torch.equal(plain[2], fused[2])
        output, layout, codes = fused
        for other in {dtype, torch.float16}:
            cast = output.to(other, copy=True)
            decoded = both(kernels, lambda: layout.values(codes, other))
            assert same(*decoded)
            assert same(decoded[0], flat(cast))
            assert both(kernels, lambda: layout.matches(codes, cast)) == [True, True]
            flat(cast).view(INTEGERS[other])[-1] ^= 1  # the last bit of the last element
            assert both(kernels, lambda: layout.matches(codes, cast)) == [False, False]
        x = x.clone(memory_format=torch.contiguous_format)
        x[0, 0, 0, 0] = torch.nan
        plain, (output, layout, codes) = both(kernels, lambda: fire(x, time_steps, None, amplitude))
        assert plain[2] is None
        assert torch.equal(plain[0].isnan(), output.isnan())
        assert torch.equal(plain[0].nan_to_num(), output.nan_to_num())
        assert layout.bad.item() == 1, "nobody waits for it, so codes are made"
        assert layout.matches(codes, output), "such codes are not compared"
        for values in both(kernels, lambda: layout.values(codes, dtype)):
            assert values.isnan().all()


def test_an_operand_changed_behind_pytorchs_back_is_an_error_in_the_backward_pass(kernels):
    kernels(True)
    neuron, layer = SpikeNeuron(4), QuantConv2d(3, 2, 1)
    set_lean(nn.Sequential(neuron, layer), True)
    x = torch.rand(2, 3, 4, 4).requires_grad_()
    first = layer(neuron(x))  # of a pass without a backward pass of its own: its comparison is read with the others
    spikes = neuron(x)
    spikes.data.view(-1)[-1] += 0.25
    changed = layer(spikes)
    with pytest.raises(QsdError, match=r"changed behind PyTorch's back .*set_lean\(model, False\)"):
        changed.sum().backward()
    first.sum().backward()
    kept = x.grad.clone()
    x.grad = None
    for change in (lambda t: t.mul_(1), lambda t: t.clone()):  # changes that PyTorch knows of
        layer(change(neuron(x))).sum().backward()
        assert torch.equal(x.grad, kept)
        x.grad = None


@pytest.mark.parametrize("neuron", [SpikeNeuron(4), LsqNeuron(4)])
def test_a_nan_in_a_neurons_input_makes_all_its_gradients_nan(kernels, neuron):
    kernels(True)
    layer = QuantConv2d(3, 2, 1)
    set_lean(nn.Sequential(neuron, layer), True)
    x = torch.rand(2, 3, 4, 4)
    x[0, 0, 0, 0] = torch.nan
    output = layer(neuron(x.requires_grad_()))
    output.nan_to_num().sum().backward()
    assert layer.weight.grad.isnan().all()
    assert not neuron(x.detach()).flatten()[1:].isnan().any()


@pytest.mark.parametrize("amplitude", [None, torch.tensor(0.7), "step"])
@pytest.mark.parametrize("package", [functional, lean])
def test_neurons_with_a_learned_threshold(kernels, package, amplitude):
    generator, threshold = torch.Generator().manual_seed(3), torch.tensor(0.3)
    is_step = amplitude == "step"
    for dtype, (time_steps, index) in product(TYPES, ((4, 0), (7, 1), (12, 2))):
        x = tensors(dtype, time_steps, generator)[index]

        def neuron(x, threshold, amplitude=None, time_steps=time_steps):
            return package.learned_spikes(x, threshold, threshold if is_step else amplitude, time_steps)

        steps = [threshold] if amplitude is None or is_step else [threshold, amplitude]
        plain, fused = both(kernels, lambda neuron=neuron, x=x, steps=steps: gradients(neuron, x, *steps))
        for a, b in zip(plain[:2], fused[:2]):
            assert same(a, b)
        # The sums of float64, with the rounded drives and gradients that PyTorch's operators sum.
        grad = cotangent(torch.empty_like(x)).double()
        drive = (x / threshold).double()
        counts = functional.round_counts(drive, time_steps)
        passed = grad * ((drive > 0) & (drive < time_steps))
        slope = 1 if is_step else (torch.tensor(1.0) if amplitude is None else amplitude).double() / threshold.double()
        by_threshold, by_amplitude = -(passed * drive).sum() * slope, (grad * counts).sum()
        exact = [by_threshold + by_amplitude] if is_step else [by_threshold, by_amplitude]
        for a, b, c in zip(fused[2:], plain[2:], exact):
            assert a.dtype == b.dtype
            assert (a - c).abs() <= (b - c).abs().maximum(4e-7 * c.abs()), (dtype, time_steps)


def test_weights_and_their_steps(kernels):
    generator = torch.Generator().manual_seed(4)
    shapes = (5, 3, 3, 3), (6, 1100), (4, 1, 1, 1), (3, 4, 3, 2)
    for dtype, (index, shape), bits in product(TYPES, enumerate(shapes), (2, 8)):
        q_min, q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        step = (torch.rand(shape[0], generator=generator) + 0.5).to(dtype)
        weight = torch.randn(shape, generator=generator).mul_(q_max).to(dtype)
        weight.view(-1)[:3] = torch.tensor([0.5, -0.25, 1.5]).to(dtype) * step[0]
        if index == 3:
            weight = weight.contiguous(memory_format=torch.channels_last)
        plain, fused = both(kernels, lambda: gradients(lambda w, s: lsq_quantize(w, s, q_min, q_max), weight, step))
        assert same(plain[0], fused[0])
        assert same(plain[1], fused[1])
        scaled = (weight / step.view(-1, *[1] * (weight.dim() - 1))).double()
        passes = (scaled >= q_min) & (scaled <= q_max)
        by_element = cotangent(weight).double() * (scaled.clamp(q_min, q_max).round() - scaled * passes)
        exact = by_element.flatten(1).sum(1) * (weight.numel() * q_max) ** -0.5
        worst = [(g[2] - exact).abs().max() for g in (plain, fused)]
        assert worst[1] <= worst[0].maximum(torch.finfo(dtype).eps * exact.abs().max()), (dtype, shape, bits)


def test_two_norms_in_a_row(kernels):
    """Against both norms one after the other, in float64."""
    generator = torch.Generator().manual_seed(5)
    for shape, memory_format in (((3, 5, 4, 6), torch.contiguous_format), ((2, 130, 3, 3), torch.channels_last)):
        x = torch.randn(shape, generator=generator).contiguous(memory_format=memory_format)
        exact = through_two_norms(lambda x, first, second: second(first(x)), x.double())
        plain, fused = both(kernels, lambda x=x: through_two_norms(lean.two_norms, x))
        assert_no_further(fused, plain, exact)


def test_a_lean_network_has_the_same_outputs_and_gradients(kernels):
    torch.manual_seed(5)
    for layers in ([SpikeNeuron(4), SepConv(4)], [LsqNeuron(4), QuantConv2d(4, 4, 3), LsqNeuron(3, 1.0)]):
        model = nn.Sequential(*layers).train()
        x = torch.randn(2, 4, 6, 5)
        for enable in (False, True):
            set_lean(model, enable)
            results = both(kernels, lambda: gradients(lambda x, *_: model(x), x))
            grads = both(kernels, lambda: torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
            assert same(results[0][0], results[1][0])
            assert same(results[0][1], results[1][1])
            for a, b in zip(*grads):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_other_tensors_are_left_to_pytorch(kernels):
    kernels(True)
    x = torch.randn(4)
    assert switch.computes(x, 0.5, torch.tensor(0.5))
    assert not switch.computes(x.double())
    assert not switch.computes(x[:0])
    assert not switch.computes(x.to("meta"))
    assert not switch.computes(x, torch.tensor(0.5).double())
    assert torch.equal(SpikeNeuron(200)(x), functional.fixed_spikes(x, 200, None, 1 / 200))
