"""Energy-price tables, and the energy of a network by layer.

Energy is computed from operation counts with the prices of one multiply-accumulate (MAC) and one accumulate (AC) in
45 nm (Horowitz, 2014); memory traffic is not in it. All figures are per image.

- ``merged`` and ``unmerged`` are this package's: spikes times their true fan-out, borders included, on the network with
  each chain of convolutions as one kernel, or factor by factor (then inner factors see analog values: MACs, once per
  image on currents summed over the window). The first layer's MACs count once, since its current is the same in every
  step.
- ``papers`` is the convention of the field: firing rate x T x dense operations of the factored network, additions all.
  The inner layers of a chain take the rate of the neuron in front of it, a product of two spike trains the lower rate.
- ``integer`` is the baseline: the factored network as an ordinary integer network with activations of
  ``ceil(log2(T + 1))`` bits, a MAC for every dense operation.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table

Preset = Literal["fp32", "fp16", "int8"]
# Price of a multiply-accumulate and of an accumulate, in pJ.
PRESETS: dict[Preset, tuple[float, float]] = {"fp32": (4.6, 0.9), "fp16": (1.5, 0.4), "int8": (0.23, 0.03)}
COLUMNS = ("merged", "unmerged", "papers", "integer")


@dataclass
class LayerEnergy:
    """Operations of one layer and their energy, per image.

    Attributes:
        name: Dotted name in the trained model; a layer that runs on several levels of a pyramid has one entry each.
        kind: ``"stem"`` (sees the image), ``"synapse"``, ``"product"`` (of attention), ``"pool"`` (running sums of a
            max-pool whose neuron fires early), ``"mean"`` (over positions), ``"resize"`` (interpolation of
            currents: weighted sums, MACs in every column, once per image on their sums over the window), or ``"other"``
            (an operation outside of the layers, or a layer that sees currents; dense MACs in every column).
        spikes: Incoming spikes.
        rate: Firing rate of the neurons in front, spikes per neuron and step (0 to 1).
        additions: Accumulates, ``merged`` and ``unmerged``.
        macs: Multiply-accumulates, ``merged`` and ``unmerged``; ``integer`` is the dense count of the factored layer.
        zero_skipping: Accumulates of a product if zeros of its integer operand are skipped, else ``None``.
        energy_mj: Energy by column, in mJ.
    """

    name: str
    kind: Literal["stem", "synapse", "product", "pool", "mean", "resize", "other"]
    spikes: float = 0.0
    rate: float = 0.0
    additions: dict[str, float] = field(default_factory=lambda: {"merged": 0.0, "unmerged": 0.0})
    macs: dict[str, float] = field(default_factory=lambda: {"merged": 0.0, "unmerged": 0.0, "integer": 0.0})
    zero_skipping: float | None = None
    energy_mj: dict[str, float] = field(default_factory=dict)


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
        preset: Name of the energy-price table.
        time_steps: T.
        merged: Whether all chains of the measured network are merged.
        images: Number of images.
        layers: In the order of execution.
        codes: The same counts in the unary and in the binary code; see `qsd.energy.CodeCost`.
    """

    preset: Preset
    time_steps: int
    merged: bool
    images: int = 0
    layers: list[LayerEnergy] = field(default_factory=list)
    codes: list[CodeCost] = field(default_factory=list)

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

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        mac, ac = PRESETS[self.preset]
        return {
            "preset": self.preset,
            "mac_pj": mac,
            "ac_pj": ac,
            "time_steps": self.time_steps,
            "merged": self.merged,
            "bits": self.bits,
            "images": self.images,
            "layers": [asdict(layer) for layer in self.layers],
            "total_mj": self.total_mj,
            "codes": [asdict(cost) for cost in self.codes],
        }

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> Table:
        """A table for the terminal, in uJ."""
        table = Table("layer", "rate", "additions", "MACs", *COLUMNS, title=f"Energy per image in uJ, {self.preset}")
        for layer in self.layers:
            numbers = [f"{1e3 * layer.energy_mj[column]:.3f}" for column in COLUMNS]
            additions, macs = layer.additions["merged"], layer.macs["merged"]
            table.add_row(layer.name, f"{layer.rate:.3f}", f"{additions:.3g}", f"{macs:.3g}", *numbers)
        table.add_section()
        table.add_row("total", "", "", "", *(f"{1e3 * self.total_mj[column]:.3f}" for column in COLUMNS))
        return table
