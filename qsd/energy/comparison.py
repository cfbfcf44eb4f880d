"""Who wins: the spiking network against the same network on integers, with memory, in both dataflows."""

from collections.abc import Mapping
from typing import Any

from qsd.spiking.layers.movement import FLOWS, NETWORKS

FLOW_NAMES = {"events": "event by event", "reuse": "with best reuse"}


def totals(layers: list[Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Energy per image in mJ by network and dataflow: arithmetic, memory and total, each at both ends of DRAM's price.

    Args:
        layers: `qsd.energy.LayerEnergy`.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for network in NETWORKS:
        for flow in FLOWS:
            arithmetic = sum(layer.arithmetic_mj.get(network, {}).get(flow, 0.0) for layer in layers)
            ends = [layer.memory_mj.get(network, {}).get(flow, [0.0, 0.0]) for layer in layers]
            memory = [sum(end[i] for end in ends) for i in range(2)]
            found.setdefault(network, {})[flow] = {
                "arithmetic": arithmetic, "memory": memory, "total": [arithmetic + end for end in memory],
            }  # fmt: skip
    return found


def break_even(spiking: tuple[float, float], integer: tuple[float, float], rate: float) -> float | None:
    """The firing rate below which spikes need less energy: 0 if they never do, 1 if they do at every rate.

    Both energies are linear in the firing rate, where the mean spike count of the neurons that fire stays the same.

    Args:
        spiking: Energy of the spiking layer without any spike, and at the rate.
        integer: The same of the integer layer.
        rate: A firing rate.

    Returns:
        The rate; ``None`` if there were no spikes to measure by.
    """
    if rate <= 0:
        return None
    gap = integer[0] - spiking[0]
    slope = ((spiking[1] - spiking[0]) - (integer[1] - integer[0])) / rate
    if gap <= 0:
        return 0.0  # A layer that is cheaper only above some rate is not called cheaper.
    return 1.0 if slope <= 0 else min(1.0, gap / slope)


def verdict(network: str, energies: Mapping[str, Any]) -> str:
    """One sentence that says who wins in both dataflows, memory included.

    Args:
        network: The network as it was converted, ``"merged"`` or ``"unmerged"``.
        energies: What `totals` returned, or a record of it.
    """
    parts = []
    for flow, name in FLOW_NAMES.items():
        mine, other = energies[network][flow]["total"], energies["integer"][flow]["total"]
        numbers = f"{_range(mine)} against {_range(other)} mJ"
        wins = {own < their for own, their in zip(mine, other)}
        if len(wins) == 2:
            parts.append(f"{name} the price of DRAM decides ({numbers})")
        elif wins.pop():
            parts.append(f"{name} spikes win by {_ratio(other, mine)} ({numbers})")
        else:
            parts.append(f"{name} integers win by {_ratio(mine, other)} ({numbers})")
    return f"With memory, {'; '.join(parts)}."


def _range(ends: list[float]) -> str:
    low, high = (f"{end:.3g}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _ratio(larger: list[float], smaller: list[float]) -> str:
    low, high = sorted(f"{a / b:.2f}" if b else "inf" for a, b in zip(larger, smaller))
    return f"{low} times" if low == high else f"{low} to {high} times"
