"""Integer biases and float multipliers with which an integer convolution gives spike counts (ours).

An integer convolution of ONNX computes ``round((sum(w n) + b) m)`` with an integer bias b and one float m per channel,
but a converted layer has a float bias. Where a neuron follows, b and m can be chosen such that the neuron's count comes
out for every sum that spike counts can give: only the sums at which the count grows by one have to fall on the right
side of a rounding threshold.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qsd.integer.weights import IntegerWeights, times_channels

Array = NDArray[np.float64]

_LEAST_GAP = 1e-5  # Relative width of the interval of multipliers; a float32 resolves 6e-8.
_LARGEST_BIAS = 2**30  # Leaves room in int32 for the sums that are added.


@dataclass
class Requantization:
    """A layer as an integer convolution takes it.

    Attributes:
        weight: int8 ``[C_out, ...]``.
        bias: int32 ``[C_out]``.
        multiplier: From the accumulator to units of the output, float32 ``[C_out]``.
    """

    weight: NDArray[np.int8]
    bias: NDArray[np.int32]
    multiplier: NDArray[np.float32]

    @classmethod
    def rounded(cls, weights: IntegerWeights, largest_input: int, unit: float | Array) -> "Requantization":
        """A layer whose bias is rounded to the grid of the accumulator.

        Args:
            weights: Weights of the layer, for the units of its input.
            largest_input: Largest value of the input's integers.
            unit: Unit of the output, or of each of its channels ``[C_out]``.
        """
        finer = weights.finer(largest_input) if weights.bias.any() else np.ones(len(weights.bias))
        accumulated = weights.scale / finer
        bias = np.rint(weights.bias / accumulated).clip(-(2**31), 2**31 - 1)
        return cls(_bytes(weights, finer), bias.astype(np.int32), (accumulated / unit).astype(np.float32))

    @classmethod
    def counting(cls, weights: IntegerWeights, threshold: float, time_steps: int) -> "Requantization | None":
        r"""A layer that takes spike counts and gives exactly the spike counts of the neuron after it.

        With the scale s and the float bias :math:`\beta` of a channel, the neuron fires k spikes or more when the
        integer sum a reaches :math:`a_k = \lceil ((k - 1/2) \theta - \beta) / s \rceil`, because its count is
        :math:`\lfloor (s a + \beta) / \theta + 1/2 \rfloor`, between 0 and T. The integers are made finer by a power
        of two f, and the convolution gives :math:`\mathrm{round}((f a + b) / D)` with a divisor D. Both agree for all
        sums if, for every k, the sum :math:`a_k` is rounded to k or more and :math:`a_k - 1` to less than k:

        .. math:: \frac{f (a_k - 1) + b}{k - 1/2} < D < \frac{f a_k + b}{k - 1/2}, \quad k = 1 \ldots T.

        For each bias b near the exact one, :math:`\beta f / s`, these bounds leave an interval for D, perhaps an empty
        one. The bias of the widest interval is taken, and in it a divisor near the exact one, :math:`\theta f / s`.

        Args:
            weights: Weights of the layer.
            threshold: Threshold of the neuron that follows.
            time_steps: T of the neurons on both sides.

        Returns:
            The layer, or ``None`` if no bias and multiplier give the counts of all sums.
        """
        finer = weights.finer(time_steps)
        growth = _CountGrowth.of(weights, threshold, time_steps)
        exact_bias, exact_divisor = np.rint(weights.bias * finer / weights.scale), threshold * finer / weights.scale
        best_gap, best_bias, divisor = np.full_like(exact_bias, -1.0), exact_bias, np.ones_like(exact_bias)
        largest = int(finer.max())
        for offset in range(-largest // 2, largest // 2 + 1):  # One unit of the integers before they were made finer.
            bias = exact_bias + offset
            lower, upper = growth.divisors(finer, bias, exact_divisor)
            gap = (upper - lower) / lower
            # Within the middle half of the interval, so that rounding to float32 cannot leave it.
            margin = (upper - lower) / 4
            middle = np.clip(exact_divisor, lower + margin, np.maximum(upper - margin, lower))
            better = gap > best_gap
            best_gap, best_bias = np.where(better, gap, best_gap), np.where(better, bias, best_bias)
            divisor = np.where(better, middle, divisor)
        if (best_gap < _LEAST_GAP).any() or (np.abs(best_bias) > _LARGEST_BIAS).any():
            return None
        return cls(_bytes(weights, finer), best_bias.astype(np.int32), (1 / divisor).astype(np.float32))


@dataclass
class _CountGrowth:
    """The integer sums around the places where a neuron's count grows to k, for k = 1 ... T (all ``[C, T]``).

    Attributes:
        before: Largest sum with fewer than k spikes.
        after: Least sum with k spikes or more.
        always: Whether all sums that occur give k spikes or more, so that ``before`` does not occur.
        never: Whether all sums that occur give fewer than k spikes, so that ``after`` does not occur.
    """

    before: Array
    after: Array
    always: NDArray[np.bool_]
    never: NDArray[np.bool_]

    @classmethod
    def of(cls, weights: IntegerWeights, threshold: float, time_steps: int) -> "_CountGrowth":
        """The sums of a layer, see `Requantization.counting`."""
        rows = weights.integers.reshape(len(weights.integers), -1)
        low = time_steps * rows.clip(max=0).sum(1, keepdims=True)  # Least and largest sum that counts 0..T can give.
        high = time_steps * rows.clip(min=0).sum(1, keepdims=True)
        needed = (_halves(time_steps) * threshold - weights.bias[:, None]) / weights.scale[:, None]
        least = np.ceil(needed)
        always, never = least <= low, least > high
        # Where the count does not grow among the sums that occur, the outermost of them bounds the divisor.
        return cls(np.where(never, high, least - 1), np.where(always, low, least), always, never)

    def divisors(self, finer: Array, bias: Array, exact: Array) -> tuple[Array, Array]:
        """The open interval of divisors, ``[C]`` each, that round all sums to the counts; empty if it ends first.

        Args:
            finer: Factor f of the integers, ``[C]``.
            bias: Integer bias b, ``[C]``.
            exact: Exact divisor, ``[C]``: an interval without an upper bound ends at twice this value.
        """
        halves = _halves(self.before.shape[1])
        below = (finer[:, None] * self.before + bias[:, None]) / halves
        above = (finer[:, None] * self.after + bias[:, None]) / halves
        lower = np.where(self.always, 0.0, below).max(1).clip(1e-6)
        unbounded = 2 * np.maximum(lower, exact)[:, None]
        return lower, np.where(self.never, unbounded, above).min(1)


def _halves(time_steps: int) -> Array:
    """The values k - 1/2 for k = 1 ... T, at which a count is rounded up to k."""
    return np.arange(time_steps, dtype=np.float64) + 0.5


def _bytes(weights: IntegerWeights, finer: Array) -> NDArray[np.int8]:
    return times_channels(finer, weights.integers).astype(np.int8)
