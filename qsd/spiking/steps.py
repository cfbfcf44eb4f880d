"""One-step functions of a network of binary spikes: what a chip does in one tick.

A neuron of threshold ``theta`` starts at ``theta / 2``. In every step charge comes before fire; a spike lowers the
membrane by ``theta`` (soft reset); there is no leak and no floor. Over its window of T steps the currents of a neuron
add up to the pre-activation that the quantized network computes at once.

The delayed neuron and the temporal decomposition are those of CSDformer (Zhang et al., 2025, Algorithm 1 and equations
20 to 23, as reconstructed from its text).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def charge(membrane: Tensor, current: Tensor) -> None:
    """Add a step's current to the membrane, in place.

    Args:
        membrane: potential ``[B, ...]``, in units of the input.
        current: input of this step, the same shape.
    """
    membrane.add_(current)


def fire(membrane: Tensor, threshold: float, spikes: Tensor) -> None:
    """Fire where the membrane has reached the threshold, and take the threshold off there, in place.

    Args:
        membrane: potential after the step's charge ``[B, ...]``.
        threshold: potential that one spike is worth.
        spikes: where 0 and 1 are written, of the same shape and type. (A comparison into numbers, and a multiple that
            is taken off: many times faster than choosing element by element.)
    """
    torch.ge(membrane, threshold, out=spikes)
    membrane.sub_(spikes, alpha=threshold)


def product_increment(
    left: Tensor, right: Tensor, left_sum: Tensor, right_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """This step's part of ``sum_t(left) sum_t(right)``, in terms with one binary operand each.

    ``S_l(t) S_r(t) - S_l(t-1) S_r(t-1) = l(t) S_r(t) + S_l(t-1) r(t)``: summed over the steps, the left side
    telescopes to the product of the counts.

    Args:
        left: binary spikes of this step ``[..., I, C]``.
        right: binary spikes of this step ``[..., C, J]``.
        left_sum: spikes of all earlier steps.
        right_sum: the same.

    Returns:
        The increment ``[..., I, J]``, and both running sums with this step in them.
    """
    right_total = right_sum + right
    increment = left @ right_total + left_sum @ right
    return increment, left_sum + left, right_total


def pool_increment(
    spikes: Tensor, spike_sum: Tensor | None, pooled_sum: Tensor | None, pool: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """This step's part of ``max_i(sum_t(spikes_i))``: by how much the largest running sum of a window has grown.

    It is 0 or 1: every sum grows by 0 or 1, so their maximum does.

    Args:
        spikes: binary, of this step ``[B, C, H, W]``.
        spike_sum: spikes of all earlier steps, ``None`` in the first.
        pooled_sum: what the pool makes of them, ``None`` in the first step.
        pool: the max-pool.

    Returns:
        The increment ``[B, C, H', W']``, and both sums with this step in them.
    """
    spike_sum = spikes if spike_sum is None else spike_sum + spikes
    total = pool(spike_sum)
    return total if pooled_sum is None else total - pooled_sum, spike_sum, total
