"""Running sums of several branches: which values are added to each other, and the common unit of their integers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qsd.integer.description import LARGEST_SUM
from qsd.integer.signals import Floats, Signal
from qsd.integer.tracing import Call, Flow
from qsd.spiking.layers import DelayedNeuron

_ADDITIONS = ("add", "sub")
_ARRANGEMENTS = ("view", "_unsafe_view", "reshape", "flatten", "permute", "transpose", "mean", "unsqueeze", "squeeze")
_MEANS = ("mean",)
# A trial rounds weights more coarsely than the network, so that its ranges may be a little smaller.
_MARGIN = 1.02
_TINY = 1e-300  # In place of a scale or a unit of zero.
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
        least: Mapping[int, Floats] | None = None,
    ) -> "Streams":
        """Find the values that are added to each other, directly or through a chain of sums.

        The unit of a running sum is at most the smallest threshold of the neurons that read it, over
        ``2**fractional_bits``. A channel whose range leaves room for fewer bits has a larger one. Where it can, a
        channel takes the scale of the first branch over a power of two, so that this branch is not rounded. The output
        has one unit for all its channels.

        Args:
            flow: The traced network.
            fractional_bits: Bits behind the point.
            scale_of: Gives the scale of a call's integers by channel, ``None`` if it has none.
            least: By number of a value the least units that 32 bits leave room for, by channel; ``None`` if they are
                unknown.
        """
        groups = _Groups()
        groups.join(flow.output, flow.output)
        for call in flow.calls:
            if call.layer is None and call.name in _ADDITIONS:
                for value in call.inputs:
                    groups.join(call.output, value)
        members, units = groups.members(), dict[int, Floats]()
        for values in members:
            wanted = _base(flow, values) * 2.0**-fractional_bits
            bound = np.zeros(1) if least is None else least[values[0]]
            unit: Floats = np.full(1, max(wanted, float(bound.max())))
            if flow.output not in values:
                scales = (scale_of(call) for call in flow.calls if call.output in values)
                unit = _shared(next((np.abs(scale) for scale in scales if scale is not None), None), wanted, bound)
            units |= dict.fromkeys(values, unit)
        return cls(units, members)

    def least(self, flow: Flow, signals: Mapping[int, Signal]) -> dict[int, Floats]:
        """The least units with which running sums fit into 32 bits, by value of a running sum and channel.

        Args:
            flow: The traced network.
            signals: Signals by number of a value, of a network of these units.
        """
        found: dict[int, Floats] = {}
        for values in self.groups:
            means = [call.output for value in values for call in flow.users(value) if call.name in _MEANS]
            read = [signals[value] for value in (*values, *means)]
            largest = np.max([np.maximum(-x.by_channel(x.low), x.by_channel(x.high)) for x in read], axis=0)
            found |= dict.fromkeys(values, self.units[values[0]] * (largest + 1) * _MARGIN / LARGEST_SUM)
        return found


def _shared(first: Floats | None, wanted: float, least: Floats) -> Floats:
    """Units from the scale of the first branch: the largest that are not above the wanted one, or the least ones.

    Args:
        first: Scale of the first branch by channel, ``None`` if there is none.
        wanted: The unit that is asked for.
        least: Units below which a channel leaves its range, by channel.
    """
    plain = np.maximum(wanted, least)
    if first is None:
        return plain
    scale = np.maximum(first, _TINY)
    places = np.minimum(np.ceil(np.log2(scale / wanted)), np.floor(np.log2(scale / np.maximum(least, _TINY))))
    return np.where((first > _TINY) & (places >= 0), scale * 2.0**-places, plain)


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
