"""What a converted network costs: additions counted from the spikes that really fell, and energy by three conventions.

Energy is computed from operation counts with the prices of one multiply-accumulate (MAC) and one accumulate (AC) in
45 nm (Horowitz, 2014); memory traffic is not in it. All figures are per image.

- ``merged`` and ``unmerged`` are ours: spikes times their true fan-out, borders included, on the network with each
  chain of convolutions as one kernel, or factor by factor (then inner factors see analog values: MACs, once per image
  on currents summed over the window). The first layer's MACs count once, since its current is the same in every step.
- ``papers`` is the convention of the field: firing rate x T x dense operations of the factored network, additions all.
  The inner layers of a chain take the rate of the neuron in front of it, a product of two spike trains the lower rate.
- ``integer`` is the rival: the factored network as an ordinary integer network with activations of
  ``ceil(log2(T + 1))`` bits, a MAC for every dense operation.
"""

import copy
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from qsd.errors import QsdError
from qsd.spiking.batches import Images, image_batches
from qsd.spiking.layers import (
    Convolution,
    SpikingChain,
    SpikingDense,
    SpikingLinear,
    SpikingMaxPool,
    SpikingPooledDense,
    SpikingProduct,
    SpikingQuery,
    TimedLayer,
)
from qsd.spiking.network import SpikingNetwork
from qsd.spiking.watch import Operation, Watch

Preset = Literal["fp32", "fp16", "int8"]
# Price of a multiply-accumulate and of an accumulate, in pJ.
PRESETS: dict[Preset, tuple[float, float]] = {"fp32": (4.6, 0.9), "fp16": (1.5, 0.4), "int8": (0.23, 0.03)}
COLUMNS = ("merged", "unmerged", "papers", "integer")
# Multiplications for a value of an interpolated map.
_TAPS = {"upsample_bilinear2d": 4, "_upsample_bilinear2d_aa": 4, "upsample_bicubic2d": 16}


@dataclass
class LayerEnergy:
    """Operations of one layer and their energy, per image.

    Attributes:
        name: dotted name in the trained model; of a layer that runs on several levels of a pyramid by level.
        kind: ``"stem"`` (sees the image), ``"synapse"``, ``"product"`` (of attention), ``"pool"`` (running sums of a
            max-pool behind a neuron that fires early), ``"mean"`` (over positions), ``"resize"`` (interpolation of
            currents: weighted sums, MACs everywhere, once per image on their sums over the window), or ``"other"``
            (an operation outside our layers, priced as dense MACs everywhere).
        spikes: that came in.
        rate: firing rate of the neurons they came from, spikes per neuron and step (0 to 1).
        additions: accumulates, ``merged`` and ``unmerged``.
        macs: multiply-accumulates, ``merged`` and ``unmerged``; ``integer`` is the dense count of the factored layer.
        zero_skipping: accumulates of a product if zeros of its integer operand are skipped, else ``None``.
        energy_mj: by column, in mJ.
    """

    name: str
    kind: Literal["stem", "synapse", "product", "pool", "mean", "resize", "other"]
    spikes: float = 0.0
    rate: float = 0.0
    additions: dict[str, float] = field(default_factory=lambda: {"merged": 0.0, "unmerged": 0.0})
    macs: dict[str, float] = field(default_factory=lambda: {"merged": 0.0, "unmerged": 0.0, "integer": 0.0})
    zero_skipping: float | None = None
    energy_mj: dict[str, float] = field(default_factory=dict)


@dataclass
class Energy:
    """What `measure_energy` counted.

    Attributes:
        preset: of prices.
        time_steps: T.
        merged: whether all chains of the measured network are merged.
        images: how many were measured.
        layers: in the order of execution.
    """

    preset: Preset
    time_steps: int
    merged: bool
    images: int = 0
    layers: list[LayerEnergy] = field(default_factory=list)

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


@torch.no_grad()
def measure_energy(
    spiking: SpikingNetwork,
    images: Images,
    preset: Preset = "fp32",
    max_images: int | None = None,
    progress: bool = True,
) -> Energy:
    """Count the operations that a converted network does on real images, and price them.

    Lossless networks are counted in the count domain (the same spikes, one pass); at shorter delays it steps.

    Args:
        spiking: the converted network, merged or not: both are counted from the same spikes.
        images: ``[B, C, H, W]``, or a data loader.
        preset: ``"fp32"`` (4.6 pJ a MAC, 0.9 pJ an addition: the papers' choice), ``"fp16"`` or ``"int8"``.
        max_images: stop after so many.
        progress: show a progress bar.

    Returns:
        Operations and energy per image, by layer and in total.

    Raises:
        QsdError: for an unknown preset, or no images.
    """
    if preset not in PRESETS:
        raise QsdError(f"preset={preset!r} is unknown; use one of {', '.join(PRESETS)}.")
    counter = OperationCounter(spiking)
    seen = 0
    for batch, _ in image_batches(images, spiking, max_images, "energy" if progress else None):
        counter.run(batch)
        seen += len(batch)
    return counter.energy(preset, seen)


class OperationCounter:
    """Adds up the operations of all runs of a network that is run from outside; `measure_energy` runs one itself.

    Args:
        spiking: the converted network.
    """

    def __init__(self, spiking: SpikingNetwork) -> None:
        self.spiking, self.time_steps = spiking, spiking.time_steps
        self.lossless = all(neuron.delay >= self.time_steps - 1 for neuron in spiking.neurons().values())
        self.layers: dict[str, LayerEnergy] = {}
        self.dense: dict[str, float] = {}  # operations of the papers' convention, summed as rate x T x dense
        self.cells: dict[str, float] = {}  # neurons x steps that could have fired
        self.watch = Watch(spiking, self._operation)

    @torch.no_grad()
    def run(self, images: Tensor) -> Any:
        """Run the network and count.

        Args:
            images: ``[B, C, H, W]``, or currents.

        Returns:
            The network's output.
        """
        counted = SpikingLinear | SpikingProduct | SpikingQuery | SpikingMaxPool
        modules = [m for m in self.spiking.network.modules() if isinstance(m, counted)]
        handles = [module.register_forward_hook(self._layer) for module in modules]
        try:
            with self.watch.on(images):
                return self.spiking(images) if self.lossless else self.spiking.simulate(images).logits
        finally:
            for handle in handles:
                handle.remove()

    def energy(self, preset: Preset, images: int) -> Energy:
        """What was counted up to here, per image.

        Args:
            preset: of prices.
            images: that the runs belong to; a network of regions runs on many of them per image.
        """
        chains = self.spiking.chains().values()
        merged = all(chain.merged is not None or len(chain.convolutions) == 1 for chain in chains)
        energy = Energy(preset, self.time_steps, merged, images)
        energy.layers = [self._finished(copy.deepcopy(layer), energy) for layer in self.layers.values()]
        return energy

    def _finished(self, layer: LayerEnergy, energy: Energy) -> LayerEnergy:
        mac, ac = (price * 1e-9 for price in PRESETS[energy.preset])  # pJ to mJ
        cells = self.cells.get(layer.name, 0)
        layer.rate = layer.spikes / cells if cells else 0.0
        for numbers in (layer.additions, layer.macs):
            numbers.update({key: value / energy.images for key, value in numbers.items()})
        layer.spikes /= energy.images
        if layer.zero_skipping is not None:
            layer.zero_skipping /= energy.images
        papers = self.dense.get(layer.name, 0) / energy.images * ac
        layer.energy_mj = {
            "merged": layer.macs["merged"] * mac + layer.additions["merged"] * ac,
            "unmerged": layer.macs["unmerged"] * mac + layer.additions["unmerged"] * ac,
            "papers": layer.macs["integer"] * mac if layer.kind in ("stem", "resize", "other") else papers,
            "integer": layer.macs["integer"] * mac,
        }
        return layer

    def _layer(self, module: TimedLayer, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        if self.spiking.runtime.mode == "trace":
            return
        with torch.utils._python_dispatch._disable_current_modes():
            if isinstance(module, SpikingLinear):
                self._synapse(module, inputs[0])
            elif isinstance(module, SpikingMaxPool):
                self._pool(module, inputs[0])
            else:
                self._product(module, *inputs)

    def _synapse(self, module: SpikingLinear, x: Tensor) -> None:
        if isinstance(module, SpikingChain):
            height, width = x.shape[-2:]
            factors = [Geometry.of(factor) for factor in module.convolutions.values()]
            merged = Geometry.merged(factors)
            fan_outs = [fan_out((height, width), geometry).to(x.device) for geometry in (merged, factors[0])]
            dense = _dense_macs(factors, height, width)
            macs = {"merged": sum(_dense_macs([merged], height, width)), "unmerged": sum(dense)}
        elif isinstance(module, SpikingDense):
            outputs = len(module.weight)
            # A mean over positions in front of the layer is taken first, where numbers are multiplied.
            positions = 1 if isinstance(module, SpikingPooledDense) else x[0].numel() // x.shape[-1]
            fan_outs, dense = [torch.tensor(outputs)] * 2, [float(positions * module.weight.numel())]
            macs = {"merged": dense[0], "unmerged": dense[0]}
        else:
            raise QsdError(
                f"layer {module.name} ({type(module).__name__}) has no energy model; build it from SpikingChain or "
                "SpikingDense."
            )
        stem = self.watch.is_image(x)
        entry = self.layers.setdefault(module.call, LayerEnergy(module.call, "stem" if stem else "synapse"))
        images = len(x) if stem or self.lossless else len(x) / self.time_steps
        entry.macs["integer"] += images * sum(dense)
        if stem:
            for key, value in macs.items():
                entry.macs[key] += images * value
            return
        spikes = float(x.sum(dtype=torch.float64))
        neurons = images * x[0].numel() * self.time_steps
        self.cells[module.call] = self.cells.get(module.call, 0) + neurons
        entry.spikes += spikes
        for key, fan in zip(("merged", "unmerged"), fan_outs):
            entry.additions[key] += float((x.double() * fan).sum())
        entry.macs["unmerged"] += images * sum(dense[1:])
        self.dense[module.call] = self.dense.get(module.call, 0) + spikes / neurons * self.time_steps * images * sum(
            dense
        )

    def _pool(self, module: SpikingMaxPool, x: Tensor) -> None:
        if self.lossless or module.without_gaps or self.watch.is_image(x):
            return
        entry = self.layers.setdefault(module.call, LayerEnergy(module.call, "pool"))
        spikes = float(x.sum(dtype=torch.float64))
        self.cells[module.call] = self.cells.get(module.call, 0) + x.numel()
        entry.spikes += spikes
        for key in ("merged", "unmerged"):
            entry.additions[key] += spikes  # each raises one running sum

    def _product(self, module: TimedLayer, left: Tensor, right: Tensor) -> None:
        rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
        entry = self.layers.setdefault(module.call, LayerEnergy(module.call, "product", zero_skipping=0.0))
        assert entry.zero_skipping is not None
        products = left.numel() // left.shape[0] // (rows * inner) * rows * inner * columns
        images = len(right) if self.lossless else len(right) / self.time_steps
        cells = images * right[0].numel() * self.time_steps
        if isinstance(module, SpikingQuery):
            matrix = left if self.lossless else self.spiking.runtime.split(left).sum(0)
            spikes, rate = float(right.sum(dtype=torch.float64)), float(right.sum(dtype=torch.float64)) / cells
            additions = spikes * rows
            rights = right if self.lossless else self.spiking.runtime.split(right).sum(0)
            skipping = float(((matrix != 0).double().sum(-2) * rights.double().sum(-1)).sum())
        else:
            spikes_left, spikes_right = (float(t.sum(dtype=torch.float64)) for t in (left, right))
            cells_left = images * left[0].numel() * self.time_steps
            spikes, rate = spikes_left + spikes_right, min(spikes_left / cells_left, spikes_right / cells)
            cells += cells_left
            additions = spikes_left * columns + spikes_right * rows
            skipping = self._zero_skipping(left.double(), right.double())
        entry.spikes += spikes
        entry.zero_skipping += skipping
        entry.macs["integer"] += images * products
        for key in ("merged", "unmerged"):
            entry.additions[key] += additions
        self.cells[module.call] = self.cells.get(module.call, 0) + cells
        self.dense[module.call] = self.dense.get(module.call, 0) + rate * self.time_steps * images * products

    def _zero_skipping(self, left: Tensor, right: Tensor) -> float:
        """Additions where the running sums that a spike meets are not zero."""
        if self.lossless:  # trains without gaps: a running sum is zero in its neuron's first step only
            later = right - (right > 0).double()
            return _meet(left, right != 0) + _meet(left != 0, later)
        lefts, rights = self.spiking.runtime.split(left), self.spiking.runtime.split(right)
        before, after = lefts.cumsum(0) - lefts, rights.cumsum(0)
        return sum(_meet(x, s != 0) + _meet(p != 0, y) for x, s, p, y in zip(lefts, after, before, rights))

    def _operation(self, operation: Operation) -> None:
        """What is outside our layers: sums over positions, and what nobody accounts for."""
        if operation.layer is not None or self.spiking.runtime.mode == "trace":
            return
        x = operation.activations[0]
        name = f"{operation.name} ({operation.torch_name})"
        if operation.torch_name in _TAPS:
            if operation.output.shape == x.shape:
                return  # each value is its own
            entry = self.layers.setdefault(name, LayerEnergy(name, "resize"))
            macs = operation.output.numel() * _TAPS[operation.torch_name]
            for key in entry.macs:
                entry.macs[key] += macs if self.lossless else macs / self.time_steps
        elif operation.kind == "reduction":
            entry = self.layers.setdefault(name, LayerEnergy(name, "mean"))
            values = x.double()
            counts = bool(
                (values >= 0).all() and (values <= self.time_steps).all() and (values == values.round()).all()
            )
            # Spikes add once each; a current comes in every step.
            additions = float(values.sum()) if counts else x.numel() * (self.time_steps if self.lossless else 1)
            for key in ("merged", "unmerged"):
                entry.additions[key] += additions
        elif operation.kind != "other":
            entry = self.layers.setdefault(name, LayerEnergy(name, "other"))
            length = x.shape[-1] if operation.torch_name != "mul" else 1
            for key in entry.macs:
                entry.macs[key] += float(operation.output.numel() * length)


def _meet(left: Tensor, right: Tensor) -> float:
    """``(left @ right).sum()`` without the product."""
    return float((left.double().sum(-2) * right.double().sum(-1)).sum())


@dataclass(frozen=True)
class Geometry:
    """Shape of a convolution: all that counting its operations needs.

    Attributes:
        channels: of the output.
        inputs: channels that one output sees.
        kernel: side of the kernel.
        stride: of the kernel.
        padding: around the input.
        groups: of channels.
        frame: pixels put around the output.
    """

    channels: int
    inputs: int
    kernel: int
    stride: int
    padding: int
    groups: int = 1
    frame: int = 0

    @classmethod
    def of(cls, factor: Convolution) -> "Geometry":
        """The shape of a convolution.

        Args:
            factor: a folded convolution.
        """
        channels, inputs, kernel, _ = factor.weight.shape
        framed = factor.frame is not None
        return cls(channels, inputs, kernel, factor.stride, factor.padding, factor.groups, int(framed))

    @classmethod
    def merged(cls, factors: "list[Geometry]") -> "Geometry":
        """The shape of the one convolution that equals a chain.

        Args:
            factors: shapes of the chain's convolutions, in order.
        """
        if len(factors) == 1:
            return factors[0]
        core = max(factors, key=lambda factor: factor.kernel)
        padding = core.padding + max(factor.frame for factor in factors)
        stride = math.prod(factor.stride for factor in factors)
        return cls(factors[-1].channels, factors[0].inputs * factors[0].groups, core.kernel, stride, padding)

    def reach(self, length: int) -> Tensor:
        """By input position along one side, the number of output positions that see it, ``[length]``.

        Args:
            length: of the input's side.
        """
        first = torch.arange(self.size(length)) * self.stride - self.padding
        positions = torch.arange(length)[:, None]
        return ((positions >= first) & (positions < first + self.kernel)).sum(1)

    def size(self, length: int) -> int:
        """Side of the output, without a frame.

        Args:
            length: of the input's side.
        """
        return (length + 2 * self.padding - self.kernel) // self.stride + 1


def fan_out(size: tuple[int, int], geometry: Geometry) -> Tensor:
    """Synapses of an input pixel, borders included: how many outputs one spike is added to, ``[H, W]``.

    Args:
        size: height and width of the input.
        geometry: of the convolution; weights that are zero count as synapses.
    """
    height, width = size
    return geometry.channels // geometry.groups * torch.outer(geometry.reach(height), geometry.reach(width))


def _dense_macs(factors: list[Geometry], height: int, width: int) -> list[float]:
    """Multiply-accumulates of each factor for one image as papers count them, positions in the padding included."""
    macs = []
    for factor in factors:
        height, width = factor.size(height), factor.size(width)
        macs.append(float(factor.channels * factor.inputs * factor.kernel**2 * height * width))
        height, width = height + 2 * factor.frame, width + 2 * factor.frame
    return macs
