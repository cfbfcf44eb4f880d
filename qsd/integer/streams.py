"""Running sums of several branches: which values are added to each other, and the common unit of their integers."""

from dataclasses import dataclass

from qsd.integer.tracing import Flow
from qsd.spiking.layers import DelayedNeuron

_ADDITIONS = ("add", "sub")
_ARRANGEMENTS = ("view", "_unsafe_view", "reshape", "flatten", "permute", "transpose", "mean", "unsqueeze", "squeeze")
# The output of a network has no threshold. Its unit is this value over the power of two.
_OUTPUT_BASE = 2.0**-6


@dataclass(frozen=True)
class Streams:
    """The units of running sums.

    Attributes:
        units: By number of a value the real value of one unit of its integers; values that no sum takes are missing.
    """

    units: dict[int, float]

    @classmethod
    def of(cls, flow: Flow, fractional_bits: int) -> "Streams":
        """Find the values that are added to each other, directly or through a chain of sums.

        The unit of a running sum is the smallest threshold of the neurons that read it, over ``2**fractional_bits``.

        Args:
            flow: The traced network.
            fractional_bits: Bits behind the point.
        """
        groups = _Groups()
        for call in flow.calls:
            if call.layer is None and call.name in _ADDITIONS:
                for value in call.inputs:
                    groups.join(call.output, value)
        groups.join(flow.output, flow.output)
        bases = {root: _base(flow, members) for root, members in groups.members().items()}
        return cls({value: bases[groups.root(value)] * 2.0**-fractional_bits for value in groups.parents})


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

    def members(self) -> dict[int, list[int]]:
        groups: dict[int, list[int]] = {}
        for value in self.parents:
            groups.setdefault(self.root(value), []).append(value)
        return groups
