"""One-step functions of a network of binary spikes: the work of a chip in one tick.

A neuron of threshold ``theta`` starts at ``theta / 2``. In every step charge comes before fire; a spike lowers the
membrane by ``theta``, in the binary code by ``theta`` times the value of the spike (soft reset); there is no leak and
no floor. Over its window the currents of a neuron add up to the pre-activation that the quantized network computes at
once.

The delayed neuron and the temporal decomposition are those of CSDformer (Zhang et al., 2025, Algorithm 1 and equations
20 to 23, as reconstructed from its text).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def charge(membrane: Tensor, current: Tensor) -> None:
    """Add a step's current to the membrane, in place.

    Args:
        membrane: Potential ``[B, ...]``, in units of the input.
        current: Input of this step, in the same shape.
    """
    membrane.add_(current)


def fire(membrane: Tensor, threshold: float, spikes: Tensor) -> None:
    """Fire where the membrane has reached the threshold, and subtract the threshold there, in place.

    Args:
        membrane: Potential after the step's charge ``[B, ...]``.
        threshold: Firing threshold, by which a spike lowers the membrane (soft reset).
        spikes: Receives 0 and 1, in the same shape and type.
    """
    # Writing the comparison as numbers and subtracting their multiple is many times faster than a selection.
    torch.ge(membrane, threshold, out=spikes)
    membrane.sub_(spikes, alpha=threshold)


def fire_half_even(membrane: Tensor, threshold: Tensor, spikes: Tensor) -> None:
    """`fire` of a neuron that rounds halves to even counts, in place.

    A membrane of exactly one threshold stands for a half: the spike that leads to an odd count needs more, and the
    one that leads to an even count does not. So the count of ``z`` thresholds is ``round(z)``, half to even, without
    any other state than the parity of the spikes so far.

    Args:
        membrane: Potential after the step's charge ``[B, ...]``.
        threshold: Firing threshold of each neuron, in the same shape; negative where the next spike leads to an even
            count. A spike changes its sign.
        spikes: Receives 0 and 1, in the same shape and type.
    """
    size = threshold.abs()
    torch.gt(membrane, size, out=spikes)
    spikes.add_((membrane == size) & (threshold < 0))
    membrane.addcmul_(spikes, size, value=-1)
    threshold.addcmul_(spikes, threshold, value=-2)


def shift(x: Tensor, places: int) -> Tensor:
    """Multiply by ``2 ** places``, which is exact in floating point.

    Args:
        x: Any tensor.
        places: Binary places; 0 returns the tensor itself.
    """
    return x * 2.0**places if places else x


def product_increment(
    left: Tensor, right: Tensor, left_sum: Tensor, right_sum: Tensor, places: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor, Tensor]:
    """This step's increment of ``sum_t(left) sum_t(right)``, in terms with one binary operand each.

    ``S_l(t) S_r(t) - S_l(t-1) S_r(t-1) = l(t) S_r(t) + S_l(t-1) r(t)``: summed over the steps, the left side
    telescopes to the product of the counts. Spikes that are shifted enter the sums shifted, and the terms are shifted
    after the product, so that one operand of each stays binary.

    Args:
        left: Binary spikes of this step ``[..., I, C]``.
        right: Binary spikes of this step ``[..., C, J]``.
        left_sum: Sum of the left spikes of all earlier steps.
        right_sum: Sum of the right spikes of all earlier steps.
        places: Binary places by which this step's left and right spikes are shifted.

    Returns:
        The increment ``[..., I, J]``, and both running sums including this step.
    """
    right_total = right_sum + shift(right, places[1])
    increment = shift(left @ right_total, places[0]) + shift(left_sum @ right, places[1])
    return increment, left_sum + shift(left, places[0]), right_total


def pool_increment(
    spikes: Tensor,
    spike_sum: Tensor | None,
    pooled_sum: Tensor | None,
    pool: Callable[[Tensor], Tensor],
    radix: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """This step's increment of ``max_i(sum_t(spikes_i))``: the growth of the largest running sum of a window.

    It is 0 or 1: every sum grows by 0 or 1, so their maximum does. Of digits the sums are the numbers that the digits
    up to now form, ``radix`` times the last one plus a digit. Their maximum begins like the largest count, so that its
    new digit is the increment.

    Args:
        spikes: Binary spikes of this step ``[B, C, H, W]``.
        spike_sum: Sum of the spikes of all earlier steps, ``None`` in the first step.
        pooled_sum: Output of the pool for that sum, ``None`` in the first step.
        pool: The max-pool.
        radix: Value of a digit in units of the digit after it.

    Returns:
        The increment ``[B, C, H', W']``, and both sums including this step.
    """
    spike_sum = spikes if spike_sum is None else _carried(spike_sum, radix) + spikes
    total = pool(spike_sum)
    return total if pooled_sum is None else total - _carried(pooled_sum, radix), spike_sum, total


def _carried(total: Tensor, radix: int) -> Tensor:
    return total if radix == 1 else total * radix
