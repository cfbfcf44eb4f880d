"""Running sums of several branches: which values are added to each other, and the common unit of their integers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qsd.integer.signals import Floats, Integers, Signal
from qsd.integer.tracing import Call, Flow
from qsd.spiking.layers import DelayedNeuron

_ADDITIONS = ("add", "sub")
_ARRANGEMENTS = ("view", "_unsafe_view", "reshape", "flatten", "permute", "transpose", "mean", "unsqueeze", "squeeze")
_MEANS = ("mean",)
# Bits of a running sum without its sign, without one for a unit that is finer than asked for, and without one that
# rounding may need.
_MAGNITUDE_BITS = 29
# The output of a network has no threshold. Its unit is this value over the power of two.
_OUTPUT_BASE = 2.0**-6


@dataclass(frozen=True)
class Streams:
    """The units of running sums.

    Attributes:
        units: By number of a value the real value of one unit of its integers, by channel or one for all; values that
            no sum takes are missing.
        groups: The values that are added to each other, and one group for the output.
    """

    units: dict[int, Floats]
    groups: list[list[int]]

    @classmethod
    def of(
        cls,
        flow: Flow,
        fractional_bits: int,
        scale_of: Callable[[Call], Floats | None],
        room: Mapping[int, Integers] | None = None,
    ) -> "Streams":
        """Find the values that are added to each other, directly or through a chain of sums.

        The unit of a running sum is at most the smallest threshold of the neurons that read it, over
        ``2**fractional_bits``. A channel whose range leaves room for fewer bits has fewer. Where it can, a channel
        takes the scale of the first branch over a power of two, so that this branch is not rounded. The output has one
        unit for all its channels.

        Args:
            flow: The traced network.
            fractional_bits: Bits behind the point.
            scale_of: Gives the scale of a call's integers by channel, ``None`` if it has none.
            room: By number of a value the bits for which there is room, by channel; ``None`` if it is unknown.
        """
        groups = _Groups()
        groups.join(flow.output, flow.output)
        for call in flow.calls:
            if call.layer is None and call.name in _ADDITIONS:
                for value in call.inputs:
                    groups.join(call.output, value)
        members, units = groups.members(), dict[int, Floats]()
        for values in members:
            bits: Integers = np.full(1, fractional_bits)
            for value in values:
                bits = bits if room is None else np.minimum(bits, room[value])
            if flow.output in values:
                units |= dict.fromkeys(values, np.full(1, _base(flow, values) * 2.0 ** -bits.min()))
                continue
            unit = _base(flow, values) * 2.0**-bits
            scales = (scale_of(call) for call in flow.calls if call.output in values)
            first = next((scale for scale in scales if scale is not None), np.zeros(1))
            finer = np.abs(first) * 2.0 ** -np.ceil(np.log2(np.maximum(np.abs(first), 1e-300) / unit))
            units |= dict.fromkeys(values, np.where(np.abs(first) >= unit, finer, unit))
        return cls(units, members)

    def room(self, flow: Flow, signals: Mapping[int, Signal], fractional_bits: int) -> dict[int, Integers]:
        """Fractional bits for which 32 bits leave room, by value of a running sum and channel.

        Args:
            flow: The traced network.
            signals: Signals by number of a value, of a network that was built with ``fractional_bits`` everywhere.
            fractional_bits: Those bits.
        """
        rooms: dict[int, Integers] = {}
        for values in self.groups:
            means = [call.output for value in values for call in flow.users(value) if call.name in _MEANS]
            read = [signals[value] for value in (*values, *means)]
            largest = np.max([np.maximum(-x.by_channel(x.low), x.by_channel(x.high)) for x in read], axis=0)
            needed = np.ceil(np.log2(np.maximum(largest, 1) + 1)).astype(np.int64)
            rooms |= dict.fromkeys(values, fractional_bits + _MAGNITUDE_BITS - needed)
        return rooms


def _base(flow: Flow, values: list[int]) -> float:
    """The smallest threshold of the neurons that read one of the values, or the base of outputs if there are none."""
    thresholds = [float(neuron.threshold_at()) for value in values for neuron in _readers(flow, value)]
    return min(thresholds, default=_OUTPUT_BASE)


def _readers(flow: Flow, value: int) -> list[DelayedNeuron]:
    """The neurons that read a value, also through an operation that only arranges it or takes its mean."""
    readers: list[DelayedNeuron] = []
    for call in flow.users(value):
        if isinstance(call.layer, DelayedNeuron):
            readers.append(call.layer)
        elif call.layer is None and call.name in _ARRANGEMENTS:
            readers.extend(_readers(flow, call.output))
    return readers


class _Groups:
    """Disjoint sets of numbers."""

    def __init__(self) -> None:
        self.parents: dict[int, int] = {}

    def root(self, value: int) -> int:
        self.parents.setdefault(value, value)
        while self.parents[value] != value:
            value = self.parents[value]
        return value

    def join(self, first: int, second: int) -> None:
        self.parents[self.root(second)] = self.root(first)

    def members(self) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for value in self.parents:
            groups.setdefault(self.root(value), []).append(value)
        return list(groups.values())
