"""Conversion of a trained classifier, measured and written to files."""

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qsd.energy import Energy, measure_energy
from qsd.errors import QsdError
from qsd.packing import ModelSize, load_packed, model_size, save_packed
from qsd.report.activity_record import ActivityRecord, activity_record
from qsd.report.measuring import Measurements, Origin, measure, write_measured
from qsd.report.options import ConversionOptions
from qsd.report.record import ClassifierAccuracy, DelayRow, Delays, Raster, Record
from qsd.spiking import Audit, Comparison, SpikingNetwork, audit_spike_driven, compare_counts, to_spike_driven
from qsd.spiking.activity import measure_activity
from qsd.spiking.batches import image_batches

_RASTER_IMAGES, _RASTER_NEURONS = 8, 48
_CHECKED_IMAGES = 8  # through the packed file that was read back


class ClassifierMeasurements(Measurements):
    """A classifier and its measurements.

    Args:
        trained: Quantized network of this package, or built from its layers; it is not changed.
        loader: Batches of images ``[B, C, H, W]`` and labels ``[B]``, iterated several times.
        options: How to convert and what to measure.
        progress: Whether to show progress bars.

    Raises:
        QsdError: If the network cannot be converted, or ``raster`` names no neuron.
    """

    spiking: SpikingNetwork

    def __init__(self, trained: nn.Module, loader: Iterable[Any], options: ConversionOptions, progress: bool) -> None:
        self.loader = loader
        self.example, _ = next(iter(image_batches(loader, trained, 1)))
        super().__init__(trained, options, progress)
        names = list(self.spiking.neurons())
        if options.raster is not None and options.raster not in names:
            raise QsdError(f"raster={options.raster!r} is no neuron of the network; the last is {names[-1]!r}.")

    @property
    def image_size(self) -> list[int]:
        return list(self.example.shape[1:])

    def convert(self, trained: Any, delay: int | dict[str, int] | None) -> SpikingNetwork:
        options = self.options
        return to_spike_driven(
            trained, delay, options.merge, options.merged_bits, example=self.example, code=options.code
        )

    def accuracy(self, count: Callable[[str, Tensor], None]) -> ClassifierAccuracy:
        images = right_trained = right_spiking = same = 0
        title = "accuracy" if self.progress else None
        for batch, labels in image_batches(self.loader, self.trained, self.options.max_images, title):
            if labels is None:
                raise QsdError(
                    "the images have no labels, so no accuracy can be measured; give batches (images, labels)."
                )
            with self.spiking.runtime.counting(count):
                logits = self.spiking.evaluate(batch)
            classes, expected = logits.argmax(1), self.trained(batch).argmax(1)
            images += len(batch)
            right_trained += int((expected == labels).sum())
            right_spiking += int((classes == labels).sum())
            same += int((classes == expected).sum())
        return ClassifierAccuracy(
            images=images,
            float_twin=self.options.float_accuracy,
            quantized=right_trained / images,
            spiking=right_spiking / images,
            class_agreement=same / images,
            way="count" if self.spiking.lossless else "simulate",
            dtype=str(next(self.trained.parameters()).dtype).removeprefix("torch."),
        )

    def compare(self, trained: Any, spiking: Any, way: Literal["count", "simulate"]) -> Comparison:
        images = self.options.max_images if way == "count" else self.options.stepped_images
        return compare_counts(trained, spiking, self.loader, way, images, self.progress)

    def delays(self) -> Delays | None:
        """Accuracy and class agreement for every delay from 0 to T - 1, the same for all neurons.

        There are no shorter delays than the lossless one in the binary code.
        """
        if self.options.code == "binary":
            return None
        steps = self.spiking.time_steps
        images = right_trained = 0
        right, same = [0] * steps, [0] * steps
        title = "delays" if self.progress else None
        for batch, labels in image_batches(self.loader, self.trained, self.options.stepped_images, title):
            expected = self.trained(batch).argmax(1)
            images += len(batch)
            right_trained += int((expected == labels).sum())
            for delay in range(steps):
                classes = self.spiking.simulate(batch, delay=delay).logits.argmax(1)
                right[delay] += int((classes == labels).sum())
                same[delay] += int((classes == expected).sum())
        rows = [
            DelayRow(
                delay=delay,
                accuracy=right[delay] / images,
                class_agreement=same[delay] / images,
                latency=self.spiking.latency(delay),
                interval=self.spiking.interval(delay),
            )
            for delay in range(steps)
        ]
        return Delays(images=images, quantized_accuracy=right_trained / images, rows=rows)

    def raster(self) -> Raster:
        """Spikes of some neurons, evenly spaced, of the layer that the options name or the last attention's query."""
        names = list(self.spiking.neurons())
        name = self.options.raster
        if name is None:
            name = next((n for n in reversed(names) if n.endswith("q_neuron")), names[-1])
        (images, _), *_ = image_batches(self.loader, self.spiking, _RASTER_IMAGES)
        trace = self.spiking.simulate(images, record=name)
        # [B, T, neurons]; the windows of a recording's frames after one another
        spikes = trace.spikes[name].flatten(2).unflatten(1, (self.spiking.frames, -1)).permute(2, 1, 0, 3).flatten(1, 2)
        neurons = spikes.shape[2]
        chosen = torch.linspace(0, neurons - 1, min(neurons, _RASTER_NEURONS)).long()
        return Raster(name=name, neurons=neurons, spikes=spikes[:, :, chosen].int().tolist())

    def pictures(self) -> ActivityRecord:
        image, _ = next(iter(image_batches(self.loader, self.spiking, 1)))
        return activity_record(measure_activity(self.spiking, image), image[0])

    def audit(self) -> Audit:
        images = self.options.stepped_images
        return audit_spike_driven(self.spiking, self.loader, max_images=images, progress=self.progress)

    def energy(self) -> Energy:
        options = self.options
        images, progress = options.max_images, self.progress
        return measure_energy(self.spiking, self.loader, options.preset, images, progress, options.prices)

    def sizes(self) -> ModelSize:
        return model_size(self.spiking)

    def pack(self, path: Path, notes: Mapping[str, Any]) -> None:
        save_packed(self.spiking, path, notes)
        images, _ = next(iter(image_batches(self.loader, self.spiking, _CHECKED_IMAGES)))
        loaded = load_packed(path, copy.deepcopy(self.trained) if self.spiking.trained.registered is None else None)
        with torch.no_grad():
            logits = loaded.to(images.device).simulate(images).logits
            same = torch.equal(logits, self.spiking.simulate(images).logits)
        if not same:
            raise QsdError("the packed network gives other logits than the one that was packed; nothing was written.")


def record_conversion(
    trained: nn.Module,
    loader: Iterable[Any],
    options: ConversionOptions | None = None,
    origin: Origin | None = None,
    progress: bool = True,
) -> tuple[SpikingNetwork, Record]:
    """Convert a trained classifier to binary spikes and measure the result.

    Args:
        trained: Quantized network of this package, or built from its layers; it is not changed.
        loader: Batches of images ``[B, C, H, W]`` and labels ``[B]``, iterated several times.
        options: How to convert and what to measure.
        origin: Where network and images come from, for the report.
        progress: Whether to show progress bars.

    Returns:
        The spiking network and the record.

    Raises:
        QsdError: If the network cannot be converted, the loader gives no labels, or an option is wrong.
    """
    measurements = ClassifierMeasurements(trained, loader, options or ConversionOptions(), progress)
    return measurements.spiking, measure(measurements, origin or Origin())


def write_conversion(
    trained: nn.Module,
    loader: Iterable[Any],
    folder: str | Path,
    options: ConversionOptions | None = None,
    origin: Origin | None = None,
    notes: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Record:
    """Convert a trained classifier, measure it, and write packed network, record and page.

    The files are ``spiking.safetensors``, ``conversion.json`` and ``report.html``. The packed file is read back, and
    must give the same logits, before any file gets its name: either all three files are complete, or none is written.

    Args:
        trained: See `record_conversion`.
        loader: See `record_conversion`.
        folder: Target folder; it is made if it does not exist. Files of an earlier conversion are replaced.
        options: See `record_conversion`.
        origin: See `record_conversion`.
        notes: Facts to store in the packed file, such as the names of classes.
        progress: See `record_conversion`.

    Raises:
        QsdError: See `record_conversion`; and if the files cannot be written or the packed one gives other logits.
    """
    options, origin = options or ConversionOptions(), origin or Origin()
    return write_measured(ClassifierMeasurements(trained, loader, options, progress), origin, folder, notes)
