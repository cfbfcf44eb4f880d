"""Bits that a layer moves: weights, membranes and spikes, in two dataflows that bound what hardware does.

- ``events``: event by event, without reuse. Every spike is an address that is read once; it fetches the weights of its
  fan-out, and reads and writes the membranes that it reaches. A network of numbers does the same for every value that
  is not zero, which is an address and a value.
- ``reuse``: best reuse. Every tensor moves once: in every time step in a network of spikes, once per image in a network
  of numbers, which computes in the count domain.

The same rules hold for four networks: ``merged`` and ``unmerged`` are the network of spikes with each chain of
convolutions as one kernel or factor by factor, ``integer`` is the factored network on numbers of ``ceil(log2(T + 1))``
bits, and ``float_twin`` the same with 32 bits for every weight, sum and activation.

Widths follow from ranges. A sum of F products of weights of a bits and values up to p is at most ``F p 2^(a - 1)``,
and its accumulator (the membrane of a spiking network) is as wide as that number and its sign, at most 32 bits. Weights
that are not quantized have 32 bits, and so have their sums.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

Network = Literal["merged", "unmerged", "integer", "float_twin"]
Flow = Literal["events", "reuse"]
NETWORKS: tuple[Network, ...] = ("merged", "unmerged", "integer", "float_twin")
FLOWS: tuple[Flow, ...] = ("events", "reuse")
FLOAT_BITS = 32  # of scales, biases, and of weights and sums that are not quantized
IMAGE_PEAK = 255.0  # of a pixel, in a network of spikes or integers


def bits_for(peak: float, signed: bool = False) -> int:
    """Bits of an integer, at most 32, as which a float counts too.

    Args:
        peak: Its largest magnitude; infinite for a float.
        signed: Whether it can be negative.
    """
    return FLOAT_BITS if math.isinf(peak) else min(FLOAT_BITS, math.ceil(math.log2(peak + 1)) + signed)


def address_bits(cells: float) -> int:
    """Bits of the address of one of so many cells.

    Args:
        cells: Number of cells per image.
    """
    return max(1, math.ceil(math.log2(max(cells, 1))))


@dataclass(frozen=True)
class Signal:
    """Range and origin of the values of a tensor, which decide how many bits one value has.

    Attributes:
        merged: Largest magnitude in the merged network, in units of the smallest step; infinite for floats.
        unmerged: The same in the unmerged and in the integer network.
        signed: Whether values can be negative.
        sources: Calls of the neurons and pools that the values come from, if they are spikes.
    """

    merged: float
    unmerged: float
    signed: bool = True
    sources: tuple[str, ...] = ()

    def bits(self, network: Network) -> int:
        """Bits of one value, summed over the window.

        Args:
            network: The network that holds it.
        """
        if network == "float_twin":
            return FLOAT_BITS
        return bits_for(self.merged if network == "merged" else self.unmerged, self.signed)

    def times(self, factor: float) -> "Signal":
        """The range of sums of so many values.

        Args:
            factor: Number of summands.
        """
        return Signal(self.merged * factor, self.unmerged * factor, self.signed)

    @classmethod
    def joined(cls, signals: "Sequence[Signal]", added: bool = False) -> "Signal":
        """The range of values of which each is one of several signals, or their sum.

        Args:
            signals: The signals.
            added: Whether they are added.
        """
        join = sum if added else max
        sources = tuple(dict.fromkeys(source for signal in signals for source in signal.sources))
        merged, unmerged = join(s.merged for s in signals), join(s.unmerged for s in signals)
        return cls(merged, unmerged, any(s.signed for s in signals), () if added else sources)


UNKNOWN = Signal(math.inf, math.inf)
IMAGE = Signal(IMAGE_PEAK, IMAGE_PEAK, signed=False)


@dataclass
class Moved:
    """Bits that are read from and written to memory.

    Attributes:
        weights_read: Weights, scales and biases; in a product of activations the entries of the other operand.
        membranes_read: Membranes, accumulators and running sums.
        membranes_written: The same.
        activations_read: Spikes, or the activations of a network of numbers.
        activations_written: The same.
    """

    weights_read: float = 0.0
    membranes_read: float = 0.0
    membranes_written: float = 0.0
    activations_read: float = 0.0
    activations_written: float = 0.0

    @property
    def total(self) -> float:
        """All bits."""
        return sum(getattr(self, entry.name) for entry in fields(self))

    def add(self, other: "Moved", share: float = 1.0) -> None:
        """Add a share of other bits.

        Args:
            other: The other bits.
            share: The share.
        """
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + share * getattr(other, entry.name))


@dataclass
class Traffic:
    """Traffic between one part of a layer and its memory, in one network, of all images together.

    Attributes:
        held: Bits per image that the memory has to hold: weights, membranes and the activations of one step.
        events: Bits that move event by event.
        reuse: Bits that move with best reuse.
        silent: Bits that would move event by event without any spike; ``None`` if spikes make no difference.
    """

    held: float
    events: Moved
    reuse: Moved
    silent: Moved | None = None

    def moved(self, flow: Flow, silent: bool = False) -> Moved:
        """Bits that move in a dataflow.

        Args:
            flow: The dataflow.
            silent: Whether there are no spikes.
        """
        if flow == "reuse":
            return self.reuse
        return self.silent if silent and self.silent is not None else self.events

    def add(self, other: "Traffic") -> None:
        """Add the traffic of another call.

        Args:
            other: Traffic between the same part and its memory.
        """
        silent = Moved()
        silent.add(self.moved("events", silent=True))
        silent.add(other.moved("events", silent=True))
        self.held, self.silent = max(self.held, other.held), silent
        self.events.add(other.events)
        self.reuse.add(other.reuse)


@dataclass
class Words:
    """Operations and memory accesses in the model of Lemaire et al. (2022), of all images together.

    Words have 32 bits. Accesses are listed with the number of words of the memory that they go to.

    Attributes:
        additions: Accumulates.
        macs: Multiply-accumulates.
        addressing_additions: Accumulates that compute addresses.
        addressing_macs: Multiply-accumulates that compute addresses.
        accesses: Words by the capacity of their memory in words.
    """

    additions: float = 0.0
    macs: float = 0.0
    addressing_additions: float = 0.0
    addressing_macs: float = 0.0
    accesses: dict[float, float] = field(default_factory=dict)

    def access(self, words: float, capacity: float) -> None:
        """Add accesses.

        Args:
            words: Their number.
            capacity: Words of the memory.
        """
        self.accesses[capacity] = self.accesses.get(capacity, 0.0) + words

    def add(self, other: "Words") -> None:
        """Add other operations and accesses.

        Args:
            other: The others.
        """
        for name in ("additions", "macs", "addressing_additions", "addressing_macs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for capacity, words in other.accesses.items():
            self.access(words, capacity)


@dataclass
class Movement:
    """What a call of a layer moves.

    Attributes:
        parts: The parts of the layer with a memory of their own, such as the factors of a chain, by network.
        output: Range and origin of the output.
        words: The same call in the model of Lemaire et al., in the merged network.
    """

    parts: Mapping[Network, list[Traffic]]
    output: Signal
    words: Words = field(default_factory=Words)


def same_parts(traffic: Mapping[Network, Traffic]) -> dict[Network, list[Traffic]]:
    """The parts of a layer that has one memory in every network.

    Args:
        traffic: Its traffic by network.
    """
    return {network: [entry] for network, entry in traffic.items()}
