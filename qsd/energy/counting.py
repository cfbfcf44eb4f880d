"""Operations of a converted network and the bits that it moves, counted from the spikes that really fell."""

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qsd.energy.accounts import Accounts, Row
from qsd.energy.codes import CodeCounter
from qsd.energy.neurobench import NeuroBench
from qsd.energy.outside import once_movement, sums_movement
from qsd.energy.prices import Preset, Prices, chosen_prices, preset_prices
from qsd.energy.pricing import price
from qsd.energy.signals import SignalWatch
from qsd.energy.table import Energy, LayerEnergy
from qsd.precision import full_float32
from qsd.spiking.batches import Images, image_batches
from qsd.spiking.layers import LayerInputs, Operations, TimedLayer
from qsd.spiking.layers.costs import Sums
from qsd.spiking.layers.movement import Movement
from qsd.spiking.network import SpikingNetwork
from qsd.spiking.signals import plain
from qsd.spiking.watch import Operation

# Multiplications for a value of an interpolated map.
_TAPS = {"upsample_bilinear2d": 4, "_upsample_bilinear2d_aa": 4, "upsample_bicubic2d": 16}


@torch.no_grad()
@full_float32()
def measure_energy(
    spiking: SpikingNetwork,
    images: Images,
    preset: Preset = "fp32",
    max_images: int | None = None,
    progress: bool = True,
    prices: Prices | str | Path | None = None,
) -> Energy:
    """Count the operations of a converted network and the bits that it moves on real images, and price them.

    Lossless networks are counted in the count domain (the same spikes, one pass); at shorter delays it steps.

    Args:
        spiking: The converted network, merged or not: both are counted from the same spikes.
        images: ``[B, C, H, W]``, or a data loader.
        preset: Name of the energy-price table: ``"fp32"`` (4.6 pJ a MAC, 0.9 pJ an addition: the papers' choice),
            ``"fp16"`` or ``"int8"``.
        max_images: Largest number of images.
        progress: Whether to show a progress bar.
        prices: Prices of one's own instead of a preset, or a YAML file with them, see `qsd.energy.prices.Prices`.

    Returns:
        Operations, bits and energy per image, by layer and in total.

    Raises:
        QsdError: For an unknown preset, prices that do not fit, or no images.
    """
    name, known = chosen_prices(preset, prices)
    counter = OperationCounter(spiking)
    seen = 0
    for batch, _ in image_batches(images, spiking, max_images, "energy" if progress else None):
        counter.run(batch)
        seen += len(batch)
    return counter.energy(name, seen, known)


class OperationCounter:
    """Adds up the operations of all runs of a network that is run from outside; `measure_energy` runs one itself.

    Layers of the engine tell their operations and the bits that they move themselves; operations outside of layers are
    seen by a `SignalWatch`.

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
        self.accounts, self.sums = Accounts(), Sums()
        self.counts = NeuroBench.of_weights(spiking)
        chains = spiking.chains().values()
        self.merged = all(chain.merged is not None or len(chain.convolutions) == 1 for chain in chains)
        self.watch = SignalWatch(spiking, self._outside)

    @torch.no_grad()
    def run(self, images: Tensor) -> Any:
        """Run the network and count.

        Args:
            images: ``[B, C, H, W]``, or currents.

        Returns:
            The network's output.
        """
        handles = [layer.register_forward_hook(self._layer) for layer in self.spiking.layers().values()]
        self.watch.start(images)
        try:
            with self.watch.on(images):
                return self.spiking.evaluate(images)
        finally:
            for handle in handles:
                handle.remove()

    def energy(self, preset: Preset | Literal["own"], images: int, prices: Prices | None = None) -> Energy:
        """The energy per image of all runs up to now.

        Args:
            preset: Name of the energy-price table; ``"own"`` with prices of one's own.
            images: Number of images that the runs belong to; a network of regions runs on many regions per image.
            prices: The prices; ``None`` for those of the preset.
        """
        if prices is None:
            assert preset != "own"
            prices = preset_prices(preset)
        energy = Energy(preset, self.time_steps, self.merged, images, [], [], prices, copy.copy(self.counts))
        layers, rows = copy.deepcopy(self.layers), self.accounts.rows()
        for name in rows:  # Neurons whose spikes go to no layer have no operations.
            layers.setdefault(name, LayerEnergy(name, "neuron"))
        for name, layer in layers.items():
            cells = self.cells.get(name, 0)
            layer.rate = layer.spikes / cells if cells else 0.0
            price(layer, rows.get(name, Row()), energy, self.papers.get(name, 0))
            energy.layers.append(layer)
        energy.codes = self.codes.costs(energy)
        return energy

    def _layer(self, layer: TimedLayer, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Add the operations of one call of a layer, and the bits that it moves."""
        if not self.watch.is_watched() or self.spiking.runtime.mode == "trace":
            return
        with torch.utils._python_dispatch._disable_current_modes():
            tensors = tuple(plain(x) for x in inputs if isinstance(x, Tensor))
            signals = tuple(self.watch.signal(x) for x in tensors)
            image = self.watch.is_image(tensors[0])
            bits = self.spiking.trained.bits, self.spiking.merged_bits
            analog = not image and self._is_analog(layer, tensors[0])
            code, stepped = self.spiking.code, not self.lossless
            given = LayerInputs(tensors, code, stepped, image, signals, *bits, analog, sums=self.sums)
            operations = layer.operations(given)
            if len(tensors[0]):  # A head of regions may get none.
                self._move(layer, given, plain(output), operations)
            if operations is not None:
                self.codes.add(layer, given, operations)
                self._add(layer, operations, given)

    def _move(self, layer: TimedLayer, inputs: LayerInputs, output: Tensor, operations: Operations | None) -> None:
        """Add the bits that a layer moves."""
        movement = layer.movement(inputs, output, operations)
        self.watch.note(output, movement.output)
        self.accounts.add(layer.call, movement, inputs.signals, carrier=layer.role in ("neuron", "pool"))
        if layer.role == "neuron":
            self._add_neurons(inputs, output, movement)

    def _add_neurons(self, inputs: LayerInputs, output: Tensor, movement: Movement) -> None:
        """Add to NeuroBench's counts."""
        cells = inputs.images * inputs.size(output) * inputs.window
        self.counts.cells += cells
        self.counts.spikes += movement.words.additions
        self.counts.updates += cells + movement.words.additions

    def _add(self, layer: TimedLayer, operations: Operations, inputs: LayerInputs) -> None:
        stem = inputs.image and layer.role == "synapse"
        entry = self.layers.setdefault(
            layer.call, LayerEnergy(layer.call, "other" if inputs.analog else "stem" if stem else layer.role)
        )
        entry.spikes += operations.spikes
        for key, number in operations.additions.items():
            entry.additions[key] += number
        for key, number in operations.macs.items():
            entry.macs[key] += number
        dense = operations.dense
        entry.macs["integer"] += dense
        entry.macs["effective"] += dense if operations.effective is None else operations.effective
        if operations.zero_skipping is not None:
            entry.zero_skipping = (entry.zero_skipping or 0.0) + operations.zero_skipping
        self.cells[layer.call] = self.cells.get(layer.call, 0) + operations.cells
        papers = operations.firing_rate * inputs.window * dense
        self.papers[layer.call] = self.papers.get(layer.call, 0) + papers
        form = "merged" if self.merged else "unmerged"
        self.counts.macs += operations.macs[form]
        self.counts.additions += operations.additions[form]
        kernel = dense if operations.dense_merged is None or not self.merged else operations.dense_merged
        self.counts.dense += kernel if inputs.image else kernel * inputs.window

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
        x, additions = operation.activations[0], 0.0
        name = f"{operation.name} ({operation.torch_name})"
        if operation.torch_name in _TAPS:
            if operation.output.shape == x.shape:
                return  # Each value is its own.
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
        if name in self.layers:
            self._move_outside(name, operation, additions)

    def _move_outside(self, name: str, operation: Operation, additions: float) -> None:
        """Add the bits that an operation outside of layers moves; its additions are those of this call."""
        (x, *_), output = operation.activations, operation.output
        if not isinstance(output, Tensor) or not len(x) or not output.numel():
            return
        steps = self.spiking.code.steps
        passes = len(x) * (steps if self.lossless else 1)
        images, signal = passes / steps, self.watch.signal(x)
        values, outputs = x.numel() / len(x), output.numel() / len(x)
        if self.layers[name].kind == "mean":
            movement = sums_movement(images, passes, values, outputs, additions, signal)
        else:
            movement = once_movement(images, values, outputs, signal)
        self.accounts.add(name, movement, (signal,))
