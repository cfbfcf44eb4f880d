"""Traffic of all layers, added up over runs, and its price.

What neurons and pools move belongs to the layers that their spikes go to, in equal shares: a row of a table then holds
the generation of its spikes and their use.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from qsd.energy.prices import Prices
from qsd.spiking.layers.movement import Flow, Moved, Movement, Network, Signal, Traffic, Words


@dataclass
class Account:
    """Traffic of one call of a layer, of all runs together.

    Attributes:
        parts: Traffic of each part with a memory of its own, by network.
        words: Operations and accesses in the model of Lemaire et al.
        consumers: Calls that the spikes of a neuron or a pool go to.
    """

    parts: dict[Network, list[Traffic]] = field(default_factory=dict)
    words: Words = field(default_factory=Words)
    consumers: list[str] = field(default_factory=list)

    def add(self, movement: Movement) -> None:
        """Add a call.

        Args:
            movement: What it moves.
        """
        for network, parts in movement.parts.items():
            known = self.parts.setdefault(network, [])
            for entry, part in zip(known, parts):
                entry.add(part)
            known.extend(parts[len(known) :])
        self.words.add(movement.words)


@dataclass
class Row:
    """A layer with its shares of the neurons and pools in front of it.

    Attributes:
        entries: Shares and accounts.
    """

    entries: list[tuple[float, Account]] = field(default_factory=list)

    def moved(self, network: Network, flow: Flow) -> Moved:
        """Bits, of all runs together.

        Args:
            network: The network.
            flow: The dataflow.
        """
        moved = Moved()
        for share, account in self.entries:
            for part in account.parts.get(network, []):
                moved.add(part.moved(flow), share)
        return moved

    def pj(self, network: Network, flow: Flow, prices: Prices, silent: bool = False) -> tuple[float, float]:
        """Energy of the accesses in pJ, at both ends of the price of DRAM, of all runs together.

        Args:
            network: The network.
            flow: The dataflow.
            prices: Prices of memories.
            silent: Whether there are no spikes.
        """
        ends = [0.0, 0.0]
        for share, account in self.entries:
            for part in account.parts.get(network, []):
                bits = share * part.moved(flow, silent).total
                for end, price in enumerate(prices.per_bit(part.held)):
                    ends[end] += bits * price
        return ends[0], ends[1]

    def words(self) -> list[tuple[float, Words]]:
        """Shares and operations in the model of Lemaire et al."""
        return [(share, account.words) for share, account in self.entries]


class Accounts:
    """The accounts of all calls of a network's layers."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._carriers: set[str] = set()

    def add(self, call: str, movement: Movement, signals: Iterable[Signal], carrier: bool = False) -> None:
        """Add a call.

        Args:
            call: Name of the call.
            movement: What it moves.
            signals: Its inputs, whose sources learn where their spikes go to.
            carrier: Whether it is a neuron or a pool, which belongs to the layers behind it.
        """
        self._accounts.setdefault(call, Account()).add(movement)
        if carrier:
            self._carriers.add(call)
            return
        for source in dict.fromkeys(source for signal in signals for source in signal.sources):
            consumers = self._accounts.setdefault(source, Account()).consumers
            if call not in consumers:
                consumers.append(call)

    def rows(self) -> dict[str, Row]:
        """A row for each layer, and for each neuron or pool whose spikes go to no layer."""
        rows: dict[str, Row] = {}
        for call, account in self._accounts.items():
            owners = account.consumers if call in self._carriers and account.consumers else [call]
            for owner in owners:
                rows.setdefault(owner, Row()).entries.append((1 / len(owners), account))
        return rows
