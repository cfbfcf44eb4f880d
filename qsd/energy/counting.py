"""Operations of a converted network, counted from the spikes that really fell."""

import copy
from typing import Any

import torch
from torch import Tensor

from qsd.energy.codes import CodeCounter
from qsd.energy.table import PRESETS, Energy, LayerEnergy, Preset
from qsd.errors import QsdError
from qsd.spiking.batches import Images, image_batches
from qsd.spiking.layers import LayerInputs, TimedLayer
from qsd.spiking.network import SpikingNetwork
from qsd.spiking.signals import plain
from qsd.spiking.watch import Operation, Watch

# Multiplications for a value of an interpolated map.
_TAPS = {"upsample_bilinear2d": 4, "_upsample_bilinear2d_aa": 4, "upsample_bicubic2d": 16}


@torch.no_grad()
def measure_energy(
    spiking: SpikingNetwork,
    images: Images,
    preset: Preset = "fp32",
    max_images: int | None = None,
    progress: bool = True,
) -> Energy:
    """Count the operations of a converted network on real images, and price them.

    Lossless networks are counted in the count domain (the same spikes, one pass); at shorter delays it steps.

    Args:
        spiking: The converted network, merged or not: both are counted from the same spikes.
        images: ``[B, C, H, W]``, or a data loader.
        preset: Name of the energy-price table: ``"fp32"`` (4.6 pJ a MAC, 0.9 pJ an addition: the papers' choice),
            ``"fp16"`` or ``"int8"``.
        max_images: Largest number of images.
        progress: Whether to show a progress bar.

    Returns:
        Operations and energy per image, by layer and in total.

    Raises:
        QsdError: For an unknown preset, or no images.
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

    Layers of the engine tell their operations themselves; operations outside of layers are seen by a `Watch`.

    Args:
        spiking: The converted network.
    """

    def __init__(self, spiking: SpikingNetwork) -> None:
        self.spiking, self.time_steps = spiking, spiking.time_steps
        self.lossless = spiking.lossless
        self.layers: dict[str, LayerEnergy] = {}
        self.papers: dict[str, float] = {}  # rate x T x dense operations
        self.cells: dict[str, float] = {}  # neurons x steps that could have fired
        self.codes = CodeCounter(spiking)
        self.watch = Watch(spiking, self._outside)

    @torch.no_grad()
    def run(self, images: Tensor) -> Any:
        """Run the network and count.

        Args:
            images: ``[B, C, H, W]``, or currents.

        Returns:
            The network's output.
        """
        handles = [layer.register_forward_hook(self._layer) for layer in self.spiking.layers().values()]
        try:
            with self.watch.on(images):
                return self.spiking.evaluate(images)
        finally:
            for handle in handles:
                handle.remove()

    def energy(self, preset: Preset, images: int) -> Energy:
        """The energy per image of all runs up to now.

        Args:
            preset: Name of the energy-price table.
            images: Number of images that the runs belong to; a network of regions runs on many regions per image.
        """
        chains = self.spiking.chains().values()
        merged = all(chain.merged is not None or len(chain.convolutions) == 1 for chain in chains)
        energy = Energy(preset, self.time_steps, merged, images)
        energy.layers = [self._finished(copy.deepcopy(layer), energy) for layer in self.layers.values()]
        energy.codes = self.codes.costs(energy)
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
        papers = self.papers.get(layer.name, 0) / energy.images * ac
        layer.energy_mj = {
            "merged": layer.macs["merged"] * mac + layer.additions["merged"] * ac,
            "unmerged": layer.macs["unmerged"] * mac + layer.additions["unmerged"] * ac,
            "papers": layer.macs["integer"] * mac if layer.kind in ("stem", "resize", "other") else papers,
            "integer": layer.macs["integer"] * mac,
        }
        return layer

    def _layer(self, layer: TimedLayer, inputs: tuple[Any, ...], _output: Tensor) -> None:
        """Add the operations of one call of a layer."""
        if self.spiking.runtime.mode == "trace" or layer.role == "neuron":
            return
        with torch.utils._python_dispatch._disable_current_modes():
            tensors = tuple(plain(x) for x in inputs)
            image = self.watch.is_image(tensors[0])
            analog = not image and self._is_analog(layer, tensors[0])
            given = LayerInputs(tensors, self.spiking.code, not self.lossless, image, analog)
            operations = layer.operations(given)
            if operations is None:
                return
            self.codes.add(layer, given, operations)
        stem = image and layer.role == "synapse"
        entry = self.layers.setdefault(
            layer.call, LayerEnergy(layer.call, "other" if analog else "stem" if stem else layer.role)
        )
        entry.spikes += operations.spikes
        for key, number in operations.additions.items():
            entry.additions[key] += number
        for key, number in operations.macs.items():
            entry.macs[key] += number
        entry.macs["integer"] += operations.dense
        if operations.zero_skipping is not None:
            entry.zero_skipping = (entry.zero_skipping or 0.0) + operations.zero_skipping
        self.cells[layer.call] = self.cells.get(layer.call, 0) + operations.cells
        papers = operations.firing_rate * given.window * operations.dense
        self.papers[layer.call] = self.papers.get(layer.call, 0) + papers

    def _is_analog(self, layer: TimedLayer, x: Tensor) -> bool:
        """Whether a synapse sees currents instead of spikes, as the first head of the large E-SpikeFormer does."""
        if layer.role != "synapse" or self.spiking.runtime.sources.get(layer.name) is not None:
            return False
        most = self.time_steps if self.lossless else 1
        return not bool(((x >= 0) & (x <= most) & (x == x.round())).all())

    def _outside(self, operation: Operation) -> None:
        """Add an operation outside of layers: a sum over positions, or one that no layer accounts for."""
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
            spikes, steps = self.spiking.code.ones(values) if self.lossless else values, self.spiking.code.steps
            additions = float(spikes.sum()) if counts else x.numel() * (steps if self.lossless else 1)
            self.codes.add_values(additions, values if counts else None)
            for key in ("merged", "unmerged"):
                entry.additions[key] += additions
        elif operation.kind != "other":
            entry = self.layers.setdefault(name, LayerEnergy(name, "other"))
            length = x.shape[-1] if operation.torch_name != "mul" else 1
            for key in entry.macs:
                entry.macs[key] += float(operation.output.numel() * length)
