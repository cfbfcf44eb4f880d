"""Integer thresholds of a neuron: the least sums at which its count grows, found over the whole range of the sum."""

from typing import Any

import numpy as np
import torch

from qsd.errors import QsdError
from qsd.integer.signals import Integers, Signal
from qsd.spiking.layers import DelayedNeuron


def integer_thresholds(neuron: DelayedNeuron, signal: Signal, scale: tuple[Any, ...]) -> tuple[Integers, Integers]:
    """The thresholds of all channels, or of a single one if all channels have the same.

    The count of a neuron grows with its input. So for k = 1 ... T there is one least integer sum with k spikes or
    more, and a bisection over the range of the sum finds it by the neuron's own count in float64. A threshold that no
    sum reaches is one more than the largest sum, and one that all sums reach is the least sum.

    Args:
        neuron: The converted neuron.
        signal: Its input.
        scale: The value of one unit of the input, where that is a product of spikes; else empty.

    Returns:
        Thresholds ``[C, T]`` or ``[1, T]``, and directions ``[C]`` or ``[1]``, -1 where sums have to be negated first.

    Raises:
        QsdError: For a neuron with a threshold of its own for every position.
    """
    threshold = neuron.threshold_at(*scale)
    if isinstance(threshold, torch.Tensor) and threshold.numel() > 1:
        raise QsdError(f"neuron {neuron.name} has thresholds by position, and an integer network has them by channel.")
    arrays = [signal.unit, signal.offset, signal.low, signal.high]
    if not signal.uniform:
        arrays = [signal.by_channel(values) for values in arrays]
    unit, offset, low, high = (np.array(values[:1] if signal.uniform else values) for values in arrays)
    direction = np.where(unit < 0, -1, 1)
    low, high = np.where(unit < 0, -high, low), np.where(unit < 0, -low, high)
    wanted = np.arange(1, neuron.time_steps + 1)
    # The least sum lies in [least, most]; at first the sum beyond the range is among them.
    least, most = (np.repeat(bound[:, None], neuron.time_steps, 1) for bound in (low, high + 1))
    while (least < most).any():
        middle = (least + most) // 2
        drive = (unit * direction)[:, None] * middle + offset[:, None]
        counts = neuron.spike_counts(torch.from_numpy(drive), *scale).numpy()
        reached = counts >= wanted
        least, most = np.where(reached, least, middle + 1), np.where(reached, middle, most)
    return least.astype(np.int64), direction
