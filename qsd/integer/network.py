"""An integer network: its description and arrays, how to run it, and the comparison with the network of floats."""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qsd.errors import QsdError
from qsd.integer.description import Description, Events, Pixels
from qsd.integer.margins import ChangedCount, Margin, changed_counts
from qsd.integer.pixels import Bytes, PixelGrid
from qsd.integer.simulator import Values, run_counts, run_steps
from qsd.spiking import SpikingNetwork
from qsd.spiking.batches import Images, image_batches
from qsd.spiking.counts import count_spikes

Array = NDArray[Any]
_IMAGES_AT_A_TIME = 16


@dataclass(frozen=True)
class LayerWidths:
    """Widths of one layer in bits.

    Attributes:
        name: Name of the layer.
        kind: Kind of the layer.
        signal: Width of its signal.
        weights: Width of its weights, ``None`` if it has none.
        entries: Width of the wide entries that weights stand for, ``None`` if there is no table.
        thresholds: Width of its thresholds, ``None`` if it has none.
    """

    name: str
    kind: str
    signal: int
    weights: int | None = None
    entries: int | None = None
    thresholds: int | None = None


@dataclass(frozen=True)
class AuditedLayer:
    """A layer in steps.

    Attributes:
        name: Name of the layer.
        kind: Kind of the layer.
        operands: Widths of both operands of its multiplications; ``None`` if one operand of each product is a bit, so
            that it only adds.
        image: Whether it was computed from the image without a neuron between.
    """

    name: str
    kind: str
    operands: tuple[int, int] | None
    image: bool


@dataclass(frozen=True)
class IntegerAudit:
    """The operations of an integer network in steps, from the integers of a run.

    Attributes:
        layers: All layers, in the order of execution.
    """

    layers: tuple[AuditedLayer, ...]

    @property
    def multiplying(self) -> tuple[AuditedLayer, ...]:
        """The layers behind the first neurons that multiply data."""
        return tuple(layer for layer in self.layers if layer.operands is not None and not layer.image)

    def check(self) -> None:
        """Raise an error if a layer behind the first neurons multiplies data.

        Raises:
            QsdError: With the name of the first such layer.
        """
        if self.multiplying:
            first = self.multiplying[0]
            assert first.operands is not None
            widths = " by ".join(map(str, first.operands))
            raise QsdError(
                f"layer {first.name} multiplies {widths} bits in steps, as do {len(self.multiplying) - 1} others; "
                "convert with merged_bits, so that chains of convolutions become one."
            )


@dataclass(frozen=True)
class IntegerComparison:
    """An integer network beside the network of floats, on the same bytes of images.

    Attributes:
        images: Number of images.
        changed: Number of images with a count that differs.
        class_changed: Number of images whose class differs.
        correct: Number of images that the integer network classifies correctly, ``None`` without labels.
        float_correct: The same for the network of floats.
        reasons: The first differing counts of each image that has one, in the order of execution, and how near their
            membranes are to a threshold.
    """

    images: int
    changed: int
    class_changed: int
    correct: int | None
    float_correct: int | None
    reasons: tuple[ChangedCount, ...]

    @property
    def first(self) -> dict[str, int]:
        """By neuron the number of images whose first differing count is there."""
        return dict(Counter(reason.neuron for reason in self.reasons))


@dataclass
class IntegerNetwork:
    """A network of small integers, made by `qsd.to_integer`.

    Attributes:
        description: Its layers as plain data.
        arrays: Integers of the layers, by ``layer/array``.
        grid: The meaning of the bytes of an image.
        margins: By neuron the real sizes of its membrane by channel.
        search: By number of fractional bits that was tried the number of images with a changed count.
        changed: The changed counts on the images of the search that are left.
    """

    description: Description
    arrays: dict[str, Array]
    grid: PixelGrid
    margins: dict[str, Margin] = field(default_factory=dict)
    search: dict[int, int] = field(default_factory=dict)
    changed: list[ChangedCount] = field(default_factory=list)

    @property
    def bounds(self) -> dict[str, float]:
        """By neuron the largest distance, in thresholds, between its membrane and the one of the network of floats.

        It holds for equal spikes before the neuron. A membrane that is farther from the next threshold gives the same
        count.
        """
        return {name: float(margin.bound.max()) for name, margin in self.margins.items()}

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(C, H, W)``."""
        return tuple(self._image.shape)

    @property
    def _image(self) -> Pixels | Events:
        first = self.description.layers[0]
        assert isinstance(first, Pixels | Events)
        return first

    def pixels(self, images: torch.Tensor) -> Bytes:
        """The bytes nearest to normalised images.

        Args:
            images: ``[B, C, H, W]``.
        """
        return self.grid.pixels(images)

    def images(self, pixels: Bytes) -> torch.Tensor:
        """The normalised images of bytes, float64.

        Args:
            pixels: uint8 ``[B, C, H, W]``.
        """
        return self.grid.images(pixels)

    def count(self, pixels: Bytes) -> Values:
        """All signals in the count domain.

        Args:
            pixels: uint8 ``[B, C, H, W]``.

        Raises:
            QsdError: If the pixels are no bytes of the network's size.
        """
        return run_counts(self.description, self.arrays, self._checked(pixels))

    def simulate(self, pixels: Bytes) -> Values:
        """All signals step by step.

        Args:
            pixels: uint8 ``[B, C, H, W]``.

        Raises:
            QsdError: If the pixels are no bytes of the network's size.
        """
        return run_steps(self.description, self.arrays, self._checked(pixels))

    def __call__(self, pixels: Bytes) -> Array:
        """The output ``[B, classes]``, in the count domain.

        Args:
            pixels: uint8 ``[B, C, H, W]``.
        """
        parts = [pixels[i : i + _IMAGES_AT_A_TIME] for i in range(0, len(pixels), _IMAGES_AT_A_TIME)]
        return np.concatenate([self.output(self.count(part)) for part in parts])

    def output(self, values: Values) -> Array:
        """The output ``[B, classes]`` of a run; the sum over the steps of a run in steps.

        Args:
            values: What `count` or `simulate` returned.
        """
        output = values.signals[self.description.output]
        steps = output.ndim - 1 > len(self.layer(self.description.output).shape)
        output = output.sum(0) if steps else output
        return output.reshape(len(output), -1)

    def neurons(self) -> list[str]:
        """Names of all neurons, as in the trained model, in the order of execution."""
        return [layer.name for layer in self.description.layers if layer.kind == "neuron"]

    def layer(self, name: str) -> Any:
        """The description of a layer.

        Args:
            name: Name of the layer.
        """
        return next(layer for layer in self.description.layers if layer.name == name)

    def widths(self) -> list[LayerWidths]:
        """The widths of all layers."""
        rows = []
        for layer in self.description.layers:
            entry = getattr(layer, "entry_bits", None) if getattr(layer, "table_shift", None) is not None else None
            weights, thresholds = (getattr(layer, key, None) for key in ("weight_bits", "threshold_bits"))
            rows.append(LayerWidths(layer.name, layer.kind, layer.bits, weights, entry, thresholds))
        return rows

    def audit(self, pixels: Bytes) -> IntegerAudit:
        """Step through images and look at the operands of every product.

        Args:
            pixels: uint8 ``[B, C, H, W]``.
        """
        values = self.simulate(pixels)
        from_image: set[str] = set()
        rows = []
        for layer in self.description.layers:
            image = layer.kind == "pixels" or any(name in from_image for name in layer.inputs)
            image = image and layer.kind != "neuron"
            if image:
                from_image.add(layer.name)
            rows.append(AuditedLayer(layer.name, layer.kind, values.multiplications.get(layer.name), image))
        return IntegerAudit(tuple(rows))

    def compare(self, spiking: SpikingNetwork, images: Images) -> IntegerComparison:
        """Compare counts and classes with those of the network of floats, in float64, on the same bytes.

        Args:
            spiking: The network that this one was made from; it is not changed.
            images: Normalised images, or a data loader with labels perhaps.
        """
        exact = copy.deepcopy(spiking).cpu().double()
        total = class_changed = correct = float_correct = 0
        labelled, reasons = True, list[ChangedCount]()
        for batch, labels in image_batches(images, exact):
            for part in range(0, len(batch), _IMAGES_AT_A_TIME):
                pixels = self.pixels(batch[part : part + _IMAGES_AT_A_TIME])
                values, wanted = self.count(pixels), self.images(pixels)
                changed = self.changed_counts(values, count_spikes(exact, wanted))
                reasons += [replace(reason, image=total + reason.image) for reason in changed]
                mine, theirs = self.output(values).argmax(1), exact(wanted).argmax(1).numpy()
                total, class_changed = total + len(pixels), class_changed + int((mine != theirs).sum())
                labelled = labelled and labels is not None
                if labels is not None:
                    known = labels[part : part + _IMAGES_AT_A_TIME].cpu().numpy()
                    correct, float_correct = (
                        correct + int((mine == known).sum()),
                        float_correct + int((theirs == known).sum()),
                    )
        answers = {"correct": correct if labelled else None, "float_correct": float_correct if labelled else None}
        return IntegerComparison(total, len(reasons), class_changed, **answers, reasons=tuple(reasons))

    def changed_counts(self, values: Values, expected: Mapping[str, torch.Tensor]) -> list[ChangedCount]:
        """The first changed counts of all images that have one.

        Args:
            values: What `count` returned.
            expected: Counts of the network of floats on the same images, by neuron.
        """
        counts = {name: expected[name].numpy() for name in self.neurons()}
        return changed_counts(self.description, self.arrays, self.margins, values.signals, counts)

    def _checked(self, pixels: Bytes) -> Bytes:
        shape = list(self.image_shape)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or list(pixels.shape[1:]) != shape:
            raise QsdError(
                f"layer {self._image.name} takes bytes of the shape [B, {', '.join(map(str, shape))}], and got "
                f"{pixels.dtype} {list(pixels.shape)}; make an integer network for images of that size."
            )
        return pixels
