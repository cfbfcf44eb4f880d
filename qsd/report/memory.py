"""The parts of the page that show memory beside the arithmetic, and NeuroBench's metrics."""

from typing import Any

from qsd import plots
from qsd.energy.comparison import FLOW_NAMES, verdict
from qsd.report.costs import EnergyRecord, Range, WithMemory
from qsd.report.rendering import Finding, PageFigure, count, page_figure, significant

NETWORK_NAMES = {
    "merged": "spiking, merged", "unmerged": "spiking, unmerged", "integer": "integer network",
    "float_twin": "float twin",
}  # fmt: skip
KINDS = ("weights_read", "membranes_read", "membranes_written", "activations_read", "activations_written")


def memory_finding(energy: EnergyRecord) -> Finding:
    """Who wins, memory included.

    Args:
        energy: Operations and energy, with memory.
    """
    assert energy.with_memory_mj is not None
    flows = energy.with_memory_mj.model_dump()
    wins = [
        own < their
        for flow in FLOW_NAMES
        for own, their in zip(flows[energy.network][flow]["total"], flows["integer"][flow]["total"])
    ]
    kind = "good" if all(wins) else "plain" if any(wins) else "bad"
    title = {"good": "Memory, spikes win:", "plain": "Memory, it depends:", "bad": "Memory, an integer network wins:"}
    return Finding(kind, title[kind], f"{verdict(energy.network, flows)} Prices: {source(energy)}.")


def source(energy: EnergyRecord) -> str:
    """Where the prices come from.

    Args:
        energy: Operations and energy, with memory.
    """
    return energy.prices.source.rstrip(".") if energy.prices else "unknown"


def memory_rows(energy: EnergyRecord | None) -> list[dict[str, str]]:
    """A row for each network and dataflow: arithmetic, memory and total in mJ.

    Args:
        energy: Operations and energy.
    """
    if energy is None:
        return []
    return [
        {
            "name": NETWORK_NAMES[network],
            "flow": name,
            "arithmetic": significant(found.arithmetic, 4),
            "memory": between(found.memory),
            "total": between(found.total),
        }
        for flow, name in FLOW_NAMES.items()
        for network, found in _of_flow(energy, flow).items()
    ]


def _of_flow(energy: EnergyRecord, flow: str) -> dict[str, WithMemory]:
    """The networks in one dataflow; none in records of earlier versions."""
    found = energy.with_memory_mj
    return {} if found is None else {network: getattr(getattr(found, network), flow) for network in NETWORK_NAMES}


def between(ends: Range) -> str:
    """A range, or one number where both ends are equal.

    Args:
        ends: Lower and upper end.
    """
    low, high = (significant(end) for end in ends)
    return low if low == high else f"{low} – {high}"


def layer_rows(energy: EnergyRecord | None) -> list[dict[str, Any]]:
    """A row for each layer: break-even rates, and totals in µJ of the spiking and the integer network.

    Args:
        energy: Operations and energy.
    """
    if energy is None or not energy.with_memory_mj:
        return []
    rows = []
    for layer in energy.layers:
        if layer.memory_mj is None or layer.arithmetic_mj is None or layer.break_even is None:
            continue
        totals, memory, arithmetic = {}, layer.memory_mj.model_dump(), layer.arithmetic_mj.model_dump()
        for kind, network in (("spiking", energy.network), ("integer", "integer")):
            for flow in FLOW_NAMES:
                ends = [1e3 * (arithmetic[network][flow] + end) for end in memory[network][flow]]
                totals[f"{kind}_{flow}"] = between(ends)
        rates = {key: rate_words(rate) for key, rate in layer.break_even.model_dump().items()}
        rows.append({"name": layer.name, "rate": layer.rate, "rates": rates, "totals": totals})
    return rows


def rate_words(rate: float | None) -> str:
    """A break-even rate.

    Args:
        rate: The rate; 0 stands for no rate, 1 for every rate.
    """
    if rate is None:
        return "–"
    return "never" if rate == 0 else "always" if rate == 1 else f"{rate:.3f}"


def bit_rows(energy: EnergyRecord | None) -> list[dict[str, Any]]:
    """A row for each layer: bits that the network as it was converted moves, in both dataflows.

    Args:
        energy: Operations and energy.
    """
    if energy is None or not energy.with_memory_mj:
        return []
    found = []
    for layer in energy.layers:
        if layer.moved is not None:
            flows = layer.moved.model_dump()[energy.network]
            cells = [count(flows[flow][kind]) for flow in FLOW_NAMES for kind in KINDS]
            found.append({"name": layer.name, "cells": cells})
    return found


def memory_figures(energy: EnergyRecord | None) -> dict[str, list[PageFigure]]:
    """Bars of arithmetic and memory.

    Args:
        energy: Operations and energy.
    """
    if energy is None or not energy.with_memory_mj:
        return {}
    bars, words = [], []
    for flow, name in FLOW_NAMES.items():
        for network, found in _of_flow(energy, flow).items():
            bars.append((name, NETWORK_NAMES[network], found.arithmetic, found.memory[0], found.memory[1]))
            words.append(f"{NETWORK_NAMES[network]} {name} {between(found.total)} mJ")
    caption = (
        "Energy per image: arithmetic, and memory at the lower price of DRAM; thin lines reach to the upper price. "
        f"Measured on {energy.images} images; preset {energy.preset}: {energy.mac_pj} pJ per MAC, {energy.ac_pj} pJ "
        f"per addition. Counts and dataflows are ours; the papers' formula has no memory. Prices: {source(energy)}."
    )
    return {"memory": [page_figure(plots.energy_with_memory(bars), f"Totals with memory: {'; '.join(words)}", caption)]}


def neurobench_rows(energy: EnergyRecord | None) -> list[dict[str, str]]:
    """NeuroBench's metrics, their values and their meaning here.

    Args:
        energy: Operations and energy.
    """
    if energy is None or energy.neurobench is None:
        return []
    found = energy.neurobench
    operations = found.synaptic_operations
    rows = (
        ("footprint", f"{significant(found.footprint / 1e6)} MB", "weights at their real width, scales and biases"),
        ("connection_sparsity", f"{found.connection_sparsity:.4f}", "share of the weights that are zero"),
        ("activation_sparsity", f"{found.activation_sparsity:.4f}", "share of neurons and time steps without a spike"),
        ("Effective_MACs", count(operations.Effective_MACs), "multiply-accumulates: inputs that are no spikes"),
        ("Effective_ACs", count(operations.Effective_ACs), "accumulates of spikes; weights that are zero are counted"),
        ("Dense", count(operations.Dense), "synapses in all time steps, whether there are spikes or not"),
        ("membrane_updates", count(found.membrane_updates), "one for the charge of each step, one for each spike"),
    )
    return [{"name": name, "value": value, "meaning": meaning} for name, value, meaning in rows]
