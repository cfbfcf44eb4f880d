"""Membranes that persist from frame to frame: integer leaky integrate-and-fire neurons over the frames of a recording.

In units of the threshold, the potential of frame f is ``U_f = decay * (U_{f-1} - n_{f-1}) + z_f`` with the input z, and
the count is ``n_f = clip(floor(U_f + 1/2), 0, T)``. The first frame starts without a remainder, so that one frame alone
is an image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qsd.functional import HALF_UP, CountRule
from qsd.rounding import TIE_WIDTH, round_counts, tie_slack


class FrameMemory(NamedTuple):
    """The memory of a neuron over the frames of a recording.

    Attributes:
        frames: Number F of frames of a recording. The batch holds the first frames of all recordings, then the second
            ones, and so on: ``[F * B, ...]``.
        decay: Share of the remainder of a frame, 0 to 1, with which the next frame starts.
    """

    frames: int
    decay: float


def frame_slack(x: Tensor, time_steps: int, threshold: float | Tensor | None, memory: FrameMemory | None) -> float:
    """`qsd.rounding.tie_slack` of a neuron that may have a memory.

    A remainder that was multiplied by the decay is rounded in every case, so that ties need the slack at any threshold.

    Args:
        x: Accumulated input.
        time_steps: T.
        threshold: Threshold in units of the input; ``None`` for ``1 / T``.
        memory: Memory of the neuron, if it has one.
    """
    if memory is not None and x.dtype == torch.float64:
        return TIE_WIDTH
    return tie_slack(x, time_steps, threshold)


def membrane_potentials(drive: Tensor, time_steps: int, memory: FrameMemory, rule: CountRule = HALF_UP) -> Tensor:
    """The membrane potential of every frame before its spikes.

    The gradient runs back through all earlier frames by the decay. It takes the spikes that were subtracted for
    constants, as in the published integer neurons.

    Args:
        drive: Input of each frame in units of the threshold, ``[F * B, ...]``.
        time_steps: T.
        memory: Number of frames and decay.
        rule: Rounding of halves, and slack for ties.

    Returns:
        Potentials in units of the threshold, in the shape of ``drive``.
    """
    if memory.frames == 1:
        return drive
    potentials: list[Tensor] = []
    slack = rule.slack or 0.0
    for z in drive.chunk(memory.frames):
        potential = z
        if potentials:
            before = potentials[-1]
            potential = z + memory.decay * (before - round_counts(before.detach(), time_steps, slack, rule.half_even))
        potentials.append(potential)
    return torch.cat(potentials)
