"""The rounding of membrane potentials to spike counts: ties, and types of few digits."""

import math

import torch
from torch import Tensor

HALF_TYPES = (torch.float16, torch.bfloat16)
# Sums in float64 that tie with a threshold are off by some 1e-13 steps where the spikes' amplitude is no binary
# fraction. Within this distance, in steps, they are ties.
TIE_WIDTH = 2.0**-30
_TINY = (torch.finfo(torch.float32).tiny, torch.finfo(torch.float64).tiny)


def tie_slack(x: Tensor, time_steps: int, threshold: float | Tensor | None) -> float:
    """The number of steps below a threshold that still reaches it, so that rounding decides no ties in float64.

    Ties are common among sums of spikes that are weighted by few values. Where amplitude and threshold are binary
    fractions, sums are exact. Elsewhere, at T = 3 say, an exact tie is computed as a little more or less, by the order
    of summation, and the trained network, its count domain and binary spikes would decide it differently. Float32
    keeps its plain rounding, as in training.

    Args:
        x: Accumulated input.
        time_steps: T.
        threshold: Threshold in units of the input; ``None`` for ``1 / T``.
    """
    if x.dtype != torch.float64:
        return 0.0
    if isinstance(threshold, Tensor):
        return TIE_WIDTH
    return 0.0 if math.frexp(time_steps if threshold is None else threshold)[0] == 0.5 else TIE_WIDTH


def round_counts(drive: Tensor, time_steps: int, slack: float = 0.0, half_even: bool = False) -> Tensor:
    """``clip(floor(drive + 1/2), 0, T)``, without a gradient.

    Args:
        drive: Input in units of the threshold.
        time_steps: T.
        slack: Steps below a threshold that still reach it, see `tie_slack`; of no effect where halves become even.
        half_even: Whether halves are rounded to the even count instead of up.
    """
    if half_even:
        return drive.round().clamp(0, time_steps)
    if drive.dtype in HALF_TYPES:  # which cannot hold 129.5, nor the sum of 1/2 and the number below it
        return round_counts(drive.float(), time_steps).to(drive.dtype)
    if torch.compiler.is_compiling():
        # Compiled by PyTorch 2.11, a Function whose output was changed in place has no gradient.
        return (drive + (0.5 + slack)).floor().clamp(0, time_steps)
    return (drive + (0.5 + slack)).floor_().clamp_(0, time_steps)


def _beyond(end: int, double: bool) -> float:
    """The distance of an integer to the next float away from zero.

    At zero, the least normal number stands for it: processors may take smaller ones for zero. Plain arithmetic, which
    PyTorch's compiler follows, where it warns of functions that remember their results.

    Args:
        end: The integer.
        double: Whether floats have 64 bits instead of 32, which are 29 binary digits more.
    """
    return max(math.ulp(end) * (1 if double else 2**29), _TINY[double])


def neighbours(q_min: int, q_max: int, double: bool) -> tuple[float, float]:
    """The floats below and above both ends of a grid of weights.

    Args:
        q_min: Smallest integer of the grid, at most zero.
        q_max: Largest integer of the grid, at least zero.
        double: Whether floats have 64 bits instead of 32.
    """
    return q_min - _beyond(q_min, double), q_max + _beyond(q_max, double)


def window(dtype: torch.dtype, time_steps: int, closed: bool) -> tuple[float, float]:
    """The numbers between which, strictly, a neuron's gradient passes, in units of the threshold.

    Args:
        dtype: Type of the drive.
        time_steps: T.
        closed: Whether it passes at 0 and T, too.
    """
    return neighbours(0, time_steps, dtype == torch.float64) if closed else (0, time_steps)


def slope(time_steps: int, threshold: float | None, amplitude: float) -> tuple[int, float | None, float]:
    """What the gradient of a neuron is multiplied by: ``(T, threshold, amplitude)``, or ``(1, None, 1.0)`` for nothing.

    The slope is amplitude over threshold. Where both are equal, as in QSD-Transformer, it is exactly one, and two
    passes over the gradient are left out.

    Args:
        time_steps: T.
        threshold: Threshold in units of the input; ``None`` for ``1 / T``, as a product with T.
        amplitude: Factor of the counts.
    """
    if amplitude == (1 / time_steps if threshold is None else threshold):
        return 1, None, 1.0
    return time_steps, threshold, amplitude


def learned_slope(threshold: Tensor, amplitude: Tensor | None) -> Tensor | None:
    """Amplitude over threshold, or ``None`` for one, where both are the same step.

    Args:
        threshold: Threshold, without dimensions.
        amplitude: Amplitude, or ``None`` for bare counts.
    """
    return None if amplitude is threshold else (1 if amplitude is None else amplitude) / threshold
