"""The energy of a network by layer.

The columns of arithmetic are computed from operation counts with the prices of one multiply-accumulate (MAC) and one
accumulate (AC) in 45 nm (Horowitz, 2014). All figures are per image.

- ``merged`` and ``unmerged`` are this package's: spikes times their true fan-out, borders included, on the network with
  each chain of convolutions as one kernel, or factor by factor (then inner factors see analog values: MACs, once per
  image on currents summed over the window). The first layer's MACs count once, since its current is the same in every
  step.
- ``papers`` is the convention of the field: firing rate x T x dense operations of the factored network, additions all.
  The inner layers of a chain take the rate of the neuron in front of it, a product of two spike trains the lower rate.
- ``integer`` is the baseline: the factored network as an ordinary integer network with activations of
  ``ceil(log2(T + 1))`` bits, a MAC for every dense operation.
- ``float_twin`` is the factored network with 32-bit floats, a MAC of floats for every dense operation.
- ``lemaire`` is the merged network in the model of `qsd.energy.lemaire`, which includes memory and has its own prices.

Memory comes on top, in the two dataflows of `qsd.spiking.layers.movement`.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from qsd.energy.comparison import FLOW_NAMES, totals, verdict
from qsd.energy.neurobench import NeuroBench
from qsd.energy.prices import Preset, Prices, preset_prices
from qsd.spiking.layers.movement import FLOWS, NETWORKS, Network

COLUMNS = ("merged", "unmerged", "papers", "integer", "float_twin", "lemaire")


_MACS = ("merged", "unmerged", "integer", "effective")


@dataclass
class LayerEnergy:
    """Operations of one layer and their energy, per image.

    Attributes:
        name: Dotted name in the trained model; a layer that runs on several levels of a pyramid has one entry each.
        kind: ``"stem"`` (sees the image), ``"synapse"``, ``"product"`` (of attention), ``"pool"`` (running sums of a
            max-pool whose neuron fires early), ``"mean"`` (over positions), ``"resize"`` (interpolation of
            currents: weighted sums, MACs in every column, once per image on their sums over the window), or ``"other"``
            (an operation outside of the layers, or a layer that sees currents; dense MACs in every column), or
            ``"neuron"`` (neurons whose spikes go to no layer).
        spikes: Incoming spikes.
        rate: Firing rate of the neurons in front, spikes per neuron and step (0 to 1).
        additions: Accumulates, ``merged`` and ``unmerged``.
        macs: Multiply-accumulates, ``merged`` and ``unmerged``; ``integer`` is the dense count of the factored layer,
            ``effective`` the same for inputs that are not zero.
        zero_skipping: Accumulates of a product if zeros of its integer operand are skipped, else ``None``.
        energy_mj: Energy by column, in mJ.
        moved: Bits moved by network, dataflow and kind, see `qsd.spiking.layers.movement.Moved`.
        arithmetic_mj: Energy of the arithmetic by network and dataflow, in mJ.
        memory_mj: Energy of the memory by network and dataflow, in mJ, at both ends of the price of DRAM.
        break_even: Firing rate below which spikes need less energy than integers, 0 to 1: ``arithmetic`` alone, and
            with memory at the lower price of DRAM in the dataflows ``events`` and ``reuse``; ``None`` without spikes.
    """

    name: str
    kind: Literal["stem", "synapse", "product", "pool", "mean", "resize", "other", "neuron"]
    spikes: float = 0.0
    rate: float = 0.0
    additions: dict[str, float] = field(default_factory=lambda: {"merged": 0.0, "unmerged": 0.0})
    macs: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_MACS, 0.0))
    zero_skipping: float | None = None
    energy_mj: dict[str, float] = field(default_factory=dict)
    moved: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    arithmetic_mj: dict[str, dict[str, float]] = field(default_factory=dict)
    memory_mj: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    break_even: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class CodeCost:
    """The network's cost in one code, per image.

    Attributes:
        code: Name of the code.
        steps: Time steps of a window.
        spikes: Spikes that come in at all layers together.
        additions: Accumulates of the network as it was converted, merged or not.
        shifts: Additions of currents that are shifted by the place of their digit: all of them in the binary code, none
            in the unary one. A shift by a fixed number of places is a wire in hardware, and the price lists have no
            price for it.
        energy_mj: Energy of additions and multiply-accumulates in mJ.
    """

    code: str
    steps: int
    spikes: float
    additions: float
    shifts: float
    energy_mj: float

    @classmethod
    def sum(cls, costs: Sequence["CodeCost"]) -> "CodeCost":
        """The cost of several networks in one code.

        Args:
            costs: Their costs, at least one.
        """
        numbers = [(cost.spikes, cost.additions, cost.shifts, cost.energy_mj) for cost in costs]
        return cls(costs[0].code, costs[0].steps, *map(math.fsum, zip(*numbers)))


@dataclass
class Energy:
    """Findings of `measure_energy`.

    Attributes:
        preset: Name of the energy-price table, or ``"own"``.
        time_steps: T.
        merged: Whether all chains of the measured network are merged.
        images: Number of images.
        layers: In the order of execution.
        codes: The same counts in the unary and in the binary code; see `qsd.energy.CodeCost`.
        prices: Prices of operations and memory.
        counts: Counts that NeuroBench's metrics are made of.
    """

    preset: Preset | Literal["own"]
    time_steps: int
    merged: bool
    images: int = 0
    layers: list[LayerEnergy] = field(default_factory=list)
    codes: list[CodeCost] = field(default_factory=list)
    prices: Prices = field(default_factory=lambda: preset_prices("fp32"))
    counts: NeuroBench = field(default_factory=NeuroBench)

    @property
    def bits(self) -> int:
        """Bits of an activation in the integer network of the same information, ``ceil(log2(T + 1))``."""
        return math.ceil(math.log2(self.time_steps + 1))

    @property
    def total_mj(self) -> dict[str, float]:
        """Energy per image in mJ by column.

        ``papers_stem_per_step`` counts the first layer's MACs T times, as some papers do.
        """
        total = {column: sum(layer.energy_mj[column] for layer in self.layers) for column in COLUMNS}
        stem = sum(layer.energy_mj["papers"] for layer in self.layers if layer.kind == "stem")
        return {**total, "papers_stem_per_step": total["papers"] + (self.time_steps - 1) * stem}

    @property
    def total(self) -> float:
        """Energy per image in mJ, of the network as it was converted: merged, or not."""
        return self.total_mj["merged" if self.merged else "unmerged"]

    @property
    def network(self) -> Network:
        """The network as it was converted, by its name among the columns."""
        return "merged" if self.merged else "unmerged"

    @property
    def with_memory_mj(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Energy per image in mJ by network and dataflow, see `qsd.energy.comparison.totals`."""
        return totals(self.layers)

    @property
    def verdict(self) -> str:
        """One sentence that says who wins, memory included, in both dataflows."""
        return verdict(self.network, self.with_memory_mj)

    @property
    def neurobench(self) -> dict[str, Any]:
        """NeuroBench's metrics by their names."""
        return self.counts.metrics(max(self.images, 1))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "preset": self.preset,
            "mac_pj": self.prices.mac_pj,
            "ac_pj": self.prices.ac_pj,
            "time_steps": self.time_steps,
            "merged": self.merged,
            "bits": self.bits,
            "images": self.images,
            "layers": [asdict(layer) for layer in self.layers],
            "total_mj": self.total_mj,
            "codes": [asdict(cost) for cost in self.codes],
            "prices": self.prices.model_dump(),
            "with_memory_mj": self.with_memory_mj,
            "neurobench": self.neurobench,
        }

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_csv(self) -> str:
        """Operations, bits and energies by layer, a row for each network and dataflow."""
        return energy_csv([asdict(layer) for layer in self.layers], self.network)

    def table(self) -> Table:
        """A table for the terminal, in uJ, of the arithmetic alone, without the model ``lemaire``."""
        columns = COLUMNS[:4]
        table = Table("layer", "rate", "additions", "MACs", *columns, title=f"Energy per image in uJ, {self.preset}")
        for layer in self.layers:
            numbers = [f"{1e3 * layer.energy_mj[column]:.3f}" for column in columns]
            additions, macs = layer.additions["merged"], layer.macs["merged"]
            table.add_row(escape(layer.name), f"{layer.rate:.3f}", f"{additions:.3g}", f"{macs:.3g}", *numbers)
        table.add_section()
        table.add_row("total", "", "", "", *(f"{1e3 * self.total_mj[column]:.3f}" for column in columns))
        return table

    def memory_table(self) -> Table:
        """A table for the terminal: arithmetic, memory and total of every network in both dataflows, in mJ."""
        title = "Energy per image in mJ, at both ends of the price of DRAM"
        table = Table("network", "dataflow", "arithmetic", "memory", "total", title=title, caption=self.verdict)
        for network, flows in self.with_memory_mj.items():
            for flow, mj in flows.items():
                ranges = [" to ".join(dict.fromkeys(f"{end:.4g}" for end in mj[key])) for key in ("memory", "total")]
                table.add_row(network, FLOW_NAMES[flow], f"{mj['arithmetic']:.4g}", *ranges)
        return table


def energy_csv(layers: list[dict[str, Any]], converted: str) -> str:
    """Operations, bits and energies of layers as CSV, a row for each layer, network and dataflow.

    Args:
        layers: `LayerEnergy` as plain data.
        converted: The network as it was converted, ``"merged"`` or ``"unmerged"``, to which break-even rates belong.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    kinds = ("weights_read", "membranes_read", "membranes_written", "activations_read", "activations_written")
    writer.writerow(
        ["layer", "kind", "network", "dataflow", "rate", "additions", "macs", *(f"{kind}_bits" for kind in kinds),
         "arithmetic_mj", "memory_low_mj", "memory_high_mj", "break_even_rate"]
    )  # fmt: skip
    for layer in layers:
        for network in NETWORKS:
            for flow in FLOWS:
                spiking = network in ("merged", "unmerged")
                numbers = "effective" if (network, flow) == ("integer", "events") else "integer"
                moved = layer["moved"].get(network, {}).get(flow, {})
                writer.writerow(
                    [layer["name"], layer["kind"], network, flow, layer["rate"],
                     layer["additions"][network] if spiking else 0.0,
                     layer["macs"][network if spiking else numbers],
                     *(moved.get(kind, 0.0) for kind in kinds),
                     layer["arithmetic_mj"].get(network, {}).get(flow, 0.0),
                     *layer["memory_mj"].get(network, {}).get(flow, [0.0, 0.0]),
                     layer["break_even"].get(flow) if network == converted else None]
                )  # fmt: skip
    return text.getvalue()
