"""Pure functions against exact or obvious implementations."""

from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsd.functional import drop_path, lsq_quantize, spike_count
from qsd.layers import MatrixProduct, SpikeProduct


def test_half_counts_round_up():
    # The published checkpoints use floor(x + 0.5); torch.round would give 0, 2, 2.
    assert spike_count(torch.tensor([0.5, 1.5, 2.5]), 4).tolist() == [1, 2, 3]


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=20), st.integers(1, 8))
def test_counts_are_the_clipped_half_up_rounding_of_exact_arithmetic(drives, time_steps):
    exact = [min(max(floor(Fraction(x) + Fraction(1, 2)), 0), time_steps) for x in drives]
    # float64, in which x + 1/2 is exact for these inputs
    assert spike_count(torch.tensor(drives, dtype=torch.float64), time_steps).tolist() == exact


def test_gradient_passes_strictly_between_silence_and_saturation():
    drive = torch.tensor([-1.0, 0.0, 1e-6, 2.0, 3.999, 4.0, 5.0], requires_grad=True)
    spike_count(drive, 4).sum().backward()
    assert drive.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]


def test_a_neuron_keeps_one_byte_per_element_for_the_backward_pass():
    kept = []
    drive = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        spike_count(drive, 4)
    assert kept == [1000]


def test_differentiating_twice_is_refused():
    drive = torch.rand(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(spike_count(drive * 4, 4).square().sum(), drive, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def _slow_lsq(weight, step, q_min, q_max):
    """The published formula, left to autograd."""
    factor = (weight.numel() * q_max) ** -0.5
    step = step.view(-1, *[1] * (weight.dim() - 1))
    step = (step - step * factor).detach() + step * factor
    scaled = (weight / step).clamp(q_min, q_max)
    return ((scaled.round() - scaled).detach() + scaled) * step


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3), (6, 1, 7, 7)])
def test_lsq_and_its_gradients_equal_the_formula_under_autograd(bits, shape):
    q_min, q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    step = (torch.rand(shape[0], dtype=torch.float64) / q_max + 0.05).requires_grad_()
    cotangent = torch.randn(shape, dtype=torch.float64)
    ours = lsq_quantize(weight, step, q_min, q_max)
    slow = _slow_lsq(weight, step, q_min, q_max)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((ours * cotangent).sum(), [weight, step]),
        torch.autograd.grad((slow * cotangent).sum(), [weight, step]),
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch, "_fake_quantize_learnable_per_channel_affine"), reason="torch dropped the op")
def test_lsq_equals_torch_s_own_operator_away_from_the_half_bin_at_the_ends():
    # torch tests the rounded value against the range, the paper's formula the value itself; they differ only between
    # q_max and q_max + 1/2 (and below q_min), so no weight is put there.
    q_min, q_max = -8, 7
    step = torch.tensor([0.1, 0.25, 0.5])
    integers = torch.cat([torch.arange(-7.4, 7, 0.1), torch.tensor([-9.2, 8.3])])
    weight = (integers * step[:, None]).requires_grad_()
    learned = step.clone().requires_grad_()
    factor = (weight.numel() * q_max) ** -0.5
    theirs = torch._fake_quantize_learnable_per_channel_affine(weight, learned, torch.zeros(3), 0, q_min, q_max, factor)
    ours = lsq_quantize(weight, learned, q_min, q_max)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * cotangent).sum(), [weight, learned]),
        torch.autograd.grad((theirs * cotangent).sum(), [weight, learned]),
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_product_is_the_exact_integer_also_under_autocast(autocast):
    # 300 tokens: sums reach thousands, where bfloat16 has a spacing of 16 and more.
    query, key, value = (torch.randint(0, 5, (2, 3, 7, 300)) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        dtype = torch.bfloat16 if autocast else torch.float32
        matrix = SpikeProduct()(value.to(dtype), key.to(dtype).transpose(-1, -2))
        product = MatrixProduct()(matrix, query.to(dtype))
    slow = torch.einsum("bhdn,bhdm,bhem->bhen", query, key, value)  # int64
    assert product.dtype == torch.float32
    assert torch.equal(product.long(), slow)


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    dropped = drop_path(torch.ones(20000, 2, 1, 1), 0.3, training=True)[:, :, 0, 0]
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert abs(dropped.mean() - 1) < 0.02  # five standard errors of 20,000 draws
    x = torch.randn(3, 2)
    assert drop_path(x, 0.3, training=False) is x
