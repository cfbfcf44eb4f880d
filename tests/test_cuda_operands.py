"""Exact sums of spike counts times weight codes on a CUDA device; skipped elsewhere."""

import contextlib

import pytest
import torch

import qsd
from qsd import operands
from qsd.layers import QuantConv2d, QuantLinear
from qsd.layers.integer_sums import _as_matrices
from qsd.layers.weights import weight_codes
from qsd.neurons import SpikeNeuron
from qsd.precision import full_float32, tf32
from tests.helpers.networks import NAMES
from tests.layers.test_integer_operands import GEOMETRIES, integer_convolution, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@contextlib.contextmanager
def autocast(dtype):
    with torch.autocast("cuda", dtype), full_float32():
        yield


# Number formats of the operands.
FORMATS = {
    "float32": full_float32,
    "TF32": tf32,
    "bfloat16": lambda: autocast(torch.bfloat16),
    "float16": lambda: autocast(torch.float16),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FORMATS)
def test_sums_of_convolutions_are_those_of_64_bit_integers(name):
    generator = torch.Generator().manual_seed(0)
    for channels, groups, kernel, stride, padding, dilation, mode in GEOMETRIES:
        channels *= 16  # so many that products run on tensor cores
        groups = channels if groups == 6 else groups
        layer = QuantConv2d(channels, channels, kernel, stride, padding, groups, weight_bits=8, dilation=dilation)
        layer.padding_mode = mode
        counts = torch.randint(128, (2, channels, 9, 8), generator=generator).float()
        # Small numbers hide large ones that were rounded: the largest codes and counts are among them.
        counts[:, :, 4:] = 127.0
        expected = integer_convolution(counts, weight_codes(layer, torch.float32), layer)
        layer = layer.eval().cuda()
        for x in (counts, counts.contiguous(memory_format=torch.channels_last)):
            with FORMATS[name]():
                dtype = operands.operand_dtype(torch.device("cuda"), 127)
                with torch.autocast("cuda", enabled=False):
                    sums = _as_matrices(layer, x.cuda().to(dtype), weight_codes(layer, dtype))
            assert (dtype == torch.float32) == (name in ("float32", "TF32"))
            assert sums.dtype == torch.float32
            assert torch.equal(sums.cpu().long(), expected), (kernel, groups)


@torch.no_grad()
@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_sums_are_exact(name):
    layer = QuantLinear(1032, 64, weight_bits=8).eval().cuda()
    layer.quantizer.step.fill_(0.5)
    layer.weight.copy_(torch.where(torch.arange(1032, device="cuda") % 7 == 0, 63.0, -64.0))  # codes 126 and -128
    counts = (127 - torch.arange(1032) % 3).repeat(512, 1).double()
    expected = counts @ (2 * layer.weight.cpu().double()).clamp(-128, 127).t() * 0.5 + layer.bias.cpu().double()
    model = torch.nn.Sequential(SpikeNeuron(127, 1.0), layer)
    qsd.set_integer_operands(model)
    with FORMATS[name]():
        assert torch.equal(model(counts.float().cuda()).cpu().double(), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["csdformer_4_256", "e_spikeformer", "qsd_tiny"])
def test_networks_have_all_counts_of_float32_in_every_format(family):
    torch.manual_seed(0)
    model = trained(next(n for n in NAMES if n.startswith(family))).cuda()
    images, counts = torch.randn(4, 3, 64, 64, device="cuda"), {}
    qsd.set_integer_operands(model, "all")
    for name, context in FORMATS.items():
        counts[name] = {}
        hooks = [
            module.register_forward_hook(
                lambda neuron, inputs, _, to=counts[name], key=key: to.update({key: neuron.counts(*inputs)})
            )
            for key, module in model.named_modules()
            if isinstance(module, SpikeNeuron)
        ]
        with context():
            counts[name]["logits"] = model(images)
        for hook in hooks:
            hook.remove()
    for name in counts:
        assert all(torch.equal(value, counts["float32"][key]) for key, value in counts[name].items()), name


@pytest.mark.parametrize("name", FORMATS)
def test_training_has_the_forward_pass_of_evaluation(name):
    model = torch.nn.Sequential(SpikeNeuron(4), QuantConv2d(64, 64, 3, padding=1, bias=True)).cuda()
    x = torch.randn(2, 64, 16, 16, device="cuda")
    qsd.set_integer_operands(model)
    with torch.no_grad(), full_float32():
        expected = model.eval()(x)
    with FORMATS[name]():
        output = model.train()(x)
        output.sum().backward()
    assert torch.equal(output.detach(), expected)
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
