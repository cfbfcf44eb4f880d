"""The fused kernels on a CUDA device, against PyTorch's operators on the processor; skipped elsewhere."""

from itertools import product

import pytest
import torch

import qsd
from qsd import functional, lean
from qsd.functional import CountRule
from qsd.lsq import lsq_quantize
from tests.helpers.kernels import assert_no_further, through_two_norms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
TYPES = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.fixture(autouse=True)
def kernels():
    qsd.set_kernels(True)
    yield
    qsd.set_kernels("auto")


def same(a, b):
    kind = INTEGERS[a.dtype]
    return a.dtype == b.dtype and torch.equal(a.cpu().view(kind), b.cpu().view(kind))


def gradients(function, device, x, *parameters):
    leaves = [t.detach().to(device).requires_grad_() for t in (x, *parameters)]
    output = function(*leaves)
    cotangent = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)
    return output.detach(), *torch.autograd.grad(output, leaves, cotangent)


def inputs(dtype, time_steps):
    """Ties and their neighbours in the type, all of them close to a count's threshold, and random numbers."""
    generator = torch.Generator().manual_seed(1)
    ties = (torch.arange(-10, 2 * time_steps + 10) / (2 * time_steps)).to(dtype)
    bits = ties.view(INTEGERS[dtype])
    near = torch.cat([(bits + offset).view(dtype) for offset in (-2, -1, 0, 1, 2)])
    return torch.cat([near[near.isfinite()], torch.randn(2**20 + 3, generator=generator).to(dtype)])


@pytest.mark.parametrize("package", [functional, lean])
@pytest.mark.parametrize("dtype", TYPES)
def test_counts_and_gradients_have_the_bits_of_a_processor(package, dtype):
    # Products that a contraction would change, and divisions that a reciprocal would.
    neurons = [(4, None, 0.25), (3, None, 1 / 3), (3, 36.0, 2 / 3), (5, 0.3, 1.0), (127, 0.01, 0.01)]
    for neuron, half_even in product(neurons, (False, True)):
        rule = CountRule(half_even, closed=half_even)
        x = inputs(dtype, neuron[0]) * (neuron[1] or 1 / neuron[0]) * neuron[0]
        here, there = (
            gradients(lambda x: package.fixed_spikes(x, *neuron, rule), device, x) for device in ("cpu", "cuda")
        )
        assert same(here[0] + 0.0, there[0] + 0.0), neuron
        assert same(here[1], there[1]), neuron


@pytest.mark.parametrize("is_step", [False, True])
@pytest.mark.parametrize("package", [functional, lean])
@pytest.mark.parametrize("dtype", TYPES)
def test_learned_thresholds_have_the_bits_of_a_processor(package, dtype, is_step):
    x, threshold = inputs(dtype, 4), torch.tensor(0.3)
    amplitude = threshold if is_step else torch.tensor(0.7)

    def neuron(x, threshold, amplitude=None):
        return package.learned_spikes(x, threshold, threshold if is_step else amplitude, 4)

    steps = [threshold] if is_step else [threshold, amplitude]
    here, there = (gradients(neuron, device, x, *steps) for device in ("cpu", "cuda"))
    assert same(here[0], there[0])
    assert same(here[1], there[1])
    # The sums of float64, of the rounded drives and gradients.
    grad, drive = torch.linspace(-1, 1, x.numel()).to(dtype).double(), (x / threshold).double()
    passed = grad * ((drive > 0) & (drive < 4))
    by_threshold = -(passed * drive).sum() * (amplitude / threshold)
    by_amplitude = (grad * functional.round_counts(drive, 4)).sum()
    exact = [by_threshold + by_amplitude] if is_step else [by_threshold, by_amplitude]
    for a, b, c in zip(here[2:], there[2:], exact):
        assert abs(b.item() - c) <= max(abs(a.item() - c), 1e-5 * abs(c)), "no further than a processor's"


def test_two_norms_in_a_row():
    generator = torch.Generator().manual_seed(5)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 130, 15, 9, generator=generator).contiguous(memory_format=memory_format)
        exact = through_two_norms(lambda x, first, second: second(first(x)), x.double())
        fused = through_two_norms(lean.two_norms, x.cuda())
        qsd.set_kernels(False)
        assert_no_further(fused, through_two_norms(lean.two_norms, x.cuda()), exact)
        qsd.set_kernels(True)


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_have_the_bits_of_a_processor(dtype):
    generator = torch.Generator().manual_seed(2)
    for shape, bits in product(((64, 32, 3, 3), (96, 1, 7, 7), (48, 3000)), (2, 4, 8)):
        q_min, q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        step = (torch.rand(shape[0], generator=generator) + 0.5).to(dtype)
        weight = torch.randn(shape, generator=generator).mul_(q_max).to(dtype)
        here, there = (
            gradients(lambda w, s: lsq_quantize(w, s, q_min, q_max), device, weight, step) for device in ("cpu", "cuda")
        )
        assert same(here[0], there[0])
        assert same(here[1], there[1])
        scaled = (weight / step.view(-1, *[1] * (weight.dim() - 1))).double()
        grad = torch.linspace(-1, 1, weight.numel()).view(shape).to(dtype).double()
        passed = grad * ((scaled >= q_min) & (scaled <= q_max))
        by_element = grad * scaled.clamp(q_min, q_max).round() - passed * scaled
        exact = by_element.flatten(1).sum(1) * (weight.numel() * q_max) ** -0.5
        worst = [(found[2].cpu().double() - exact).abs().max() for found in (here, there)]
        assert worst[1] <= max(worst[0], torch.finfo(dtype).eps * exact.abs().max()), "no further than a processor's"


def test_an_operand_changed_behind_pytorchs_back_is_an_error_in_the_backward_pass():
    neuron, layer = qsd.neurons.SpikeNeuron(4).cuda(), qsd.layers.QuantConv2d(64, 8, 1).cuda()
    qsd.set_lean(torch.nn.Sequential(neuron, layer), True)
    x = torch.rand(4, 64, 16, 16, device="cuda").requires_grad_()
    spikes = neuron(x)
    spikes.data.view(-1)[-1] += 0.25
    output = layer(spikes)
    with pytest.raises(qsd.QsdError, match="behind PyTorch's back"):
        output.sum().backward()
    layer(neuron(x).mul_(1)).sum().backward()
    assert x.grad.abs().sum() > 0


def test_compiled_training_uses_the_kernels_and_counts_the_same():
    layer = qsd.neurons.SpikeNeuron(3).cuda()
    x = inputs(torch.float32, 3).cuda().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    assert same(compiled(x).detach(), layer(x).detach())
    assert same(gradient, expected)
