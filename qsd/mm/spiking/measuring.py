"""Conversion of a trained detector or segmenter, measured and written to files."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, init_default_scope
from rich.progress import track
from torch import Tensor

from qsd.energy import Energy
from qsd.errors import QsdError
from qsd.mm.spiking.activity import dense_input
from qsd.mm.spiking.comparison import DetectionComparison, compare_model, contents
from qsd.mm.spiking.model import Batch, ConvertedModel, convert_model, predict, total_energy
from qsd.mm.spiking.segments import DENSE, dense_head
from qsd.packing import ModelSize, load_packed, model_size, save_packed
from qsd.report import ConversionOptions, Origin, Record
from qsd.report.activity_record import ActivityRecord, activity_record
from qsd.report.costs import EnergyTotals
from qsd.report.measuring import Measurements, measure, write_measured
from qsd.report.record import DenseAccuracy, Metric, Segment
from qsd.spiking import Audit
from qsd.spiking.activity import measure_activity

STAGES = ("compare", "activity", "audit", "energy")
# A detector runs many regions per image, so fewer images are simulated than of a classifier.
DEFAULTS: dict[str, Any] = {"step_images": 8, "stages": STAGES}


class ImageSubset:
    """The first images of a data set, in batches of one, each loaded when it is asked for.

    Args:
        dataset: Data set of mmdet or mmseg.
        count: Number of images; ``None`` for all.
    """

    def __init__(self, dataset: Any, count: int | None = None) -> None:
        self.dataset = dataset
        self.count = len(dataset) if count is None else min(count, len(dataset))

    @property
    def complete(self) -> bool:
        """Whether these are all images of the data set."""
        return self.count == len(self.dataset)

    def first(self, count: int | None) -> "ImageSubset":
        """The first of these images.

        Args:
            count: Largest number of images; ``None`` for all.
        """
        return ImageSubset(self.dataset, self.count if count is None else min(count, self.count))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return (pseudo_collate([self.dataset[i]]) for i in range(self.count))


def load_part(config: Config, part: str) -> tuple[Any, Evaluator]:
    """Data set and evaluator of one part of the data.

    Args:
        config: Configuration of a training.
        part: ``"val"`` or ``"test"``.

    Raises:
        QsdError: If the configuration has no such part.
    """
    if config.get(f"{part}_dataloader") is None or config.get(f"{part}_evaluator") is None:
        raise QsdError(f"the configuration has no {part}_dataloader and {part}_evaluator; choose another part.")
    init_default_scope(config.default_scope)
    address = next((text for text in _texts(config[f"{part}_dataloader"].dataset) if "://" in text), None)
    if address is not None:
        raise QsdError(f"the {part} data are at {address}, which is not fetched; give a folder with data_root=DIR.")
    try:
        dataset = DATASETS.build(config[f"{part}_dataloader"].dataset)
        evaluator = Evaluator(config[f"{part}_evaluator"])
    except (QsdError, OSError):
        raise
    except Exception as error:  # whatever OpenMMLab's classes say of arguments that do not fit
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise QsdError(f"the {part} data or their metrics cannot be built: {reason}") from error
    evaluator.dataset_meta = dataset.metainfo
    return dataset, evaluator


def _texts(value: Any) -> Iterator[str]:
    """All texts in a part of a configuration."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


class DetectorMeasurements(Measurements):
    """A detector or segmenter and its measurements.

    Args:
        trained: Trained model; it is not changed.
        images: Images to measure on.
        options: How to convert and what to measure.
        evaluator: Metrics of the data set, which are measured if the images are all of it.
        progress: Whether to show progress bars.

    Raises:
        QsdError: If the model cannot be converted, or there are no images.
    """

    stages = STAGES
    spiking: ConvertedModel

    def __init__(
        self,
        trained: Any,
        images: ImageSubset,
        options: ConversionOptions,
        evaluator: Evaluator | None,
        progress: bool,
    ) -> None:
        if not len(images):
            raise QsdError("there are no images to measure on; give at least one.")
        self.images = images.first(options.max_images)
        self.stepped = images.first(options.stepped_images)
        self.evaluator = evaluator if self.images.complete else None
        self.inputs: dict[str, int] = {}
        self.energies: dict[str, Energy] = {}
        super().__init__(trained, options, progress)

    @property
    def image_size(self) -> list[int]:
        return list(next(iter(self.images))["inputs"][0].shape)

    def convert(self, trained: Any, delay: int | dict[str, int] | None) -> ConvertedModel:
        options = self.options
        return convert_model(trained, delay, options.merge, options.merged_bits, options.code)

    def accuracy(self, count: Callable[[str, Tensor], None]) -> DenseAccuracy:
        """Metrics of the trained and the spiking model; the inputs of each segment are counted on the way."""

        def run(name: str, x: Tensor) -> Any:
            self.inputs[name] = self.inputs.get(name, 0) + len(x)
            return self.spiking.segments[name].evaluate(x)

        trained = self._metrics_of(self.trained) if self.evaluator else {}
        with self.spiking.running(run), self.spiking.counting(count):
            spiking = self._metrics_of(self.spiking.model)
        segmenter = dense_head(self.trained) == "decode_head"
        return DenseAccuracy(
            kind="segmenter" if segmenter else "detector",
            images=len(self.images),
            way="count" if self.spiking.lossless else "simulate",
            dtype=str(next(self.trained.parameters()).dtype).removeprefix("torch."),
            metrics=[Metric(name=key, quantized=trained[key], spiking=value) for key, value in spiking.items()],
        )

    def compare(self, trained: Any, spiking: Any, way: Literal["count", "simulate"]) -> DetectionComparison:
        batches = self.images if way == "count" else self.stepped
        return compare_model(trained, spiking, batches, way, self.progress)

    def audit(self) -> Audit:
        return self.spiking.audit(self.stepped, progress=self.progress)

    def energy(self) -> Energy:
        options = self.options
        self.energies = self.spiking.energy(self.images, options.preset, self.progress, options.prices)
        return total_energy(self.energies)

    def pictures(self) -> ActivityRecord:
        image = dense_input(self.spiking, next(iter(self.images)))
        return activity_record(measure_activity(self.spiking.segments[DENSE], image), image[0])

    def sizes(self) -> ModelSize:
        converted = [model_size(network).converted_bytes or 0 for network in self.spiking.segments.values()]
        return replace(model_size(self.trained), converted_bytes=sum(converted))

    def segments(self) -> list[Segment]:
        return [
            Segment(
                name=name,
                latency=network.latency(),
                interval=network.interval(),
                inputs=self.inputs.get(name, 0) / len(self.images),
                energy_mj=EnergyTotals(**self.energies[name].total_mj) if self.energies else None,
            )
            for name, network in self.spiking.segments.items()
        ]

    @torch.no_grad()
    def pack(self, path: Path, notes: Mapping[str, Any]) -> None:
        """Write the trained model at its real precision, and check that the file gives the same predictions."""
        save_packed(self.trained, path, notes)
        loaded = load_packed(path, copy.deepcopy(self.trained))
        batch = next(iter(self.images))
        expected, found = (contents(predict(model, batch)[0]) for model in (self.trained, loaded))
        if not all(torch.equal(value, found[key]) for key, value in expected.items()):
            raise QsdError("the packed model gives other predictions than the trained one; nothing was written.")

    def _metrics_of(self, model: Any) -> dict[str, float]:
        batches: Iterable[Batch] = self.images
        for batch in track(batches, "accuracy", transient=True) if self.progress else batches:
            samples = predict(model, batch)
            if self.evaluator:
                self.evaluator.process(data_samples=samples, data_batch=batch)
        return _metrics(self.evaluator) if self.evaluator else {}


def record_model(
    trained: Any,
    images: ImageSubset,
    options: ConversionOptions | None = None,
    origin: Origin | None = None,
    evaluator: Evaluator | None = None,
    progress: bool = True,
) -> tuple[ConvertedModel, Record]:
    """Convert a trained detector or segmenter and measure the result.

    Args:
        trained: Trained model; it is not changed.
        images: Images to measure on.
        options: How to convert and what to measure.
        origin: Where model and images come from, for the report.
        evaluator: Metrics of the data set, which are measured if the images are all of it.
        progress: Whether to show progress bars.

    Returns:
        The spiking model and the record.

    Raises:
        QsdError: If the model cannot be converted, or there are no images.
    """
    measurements = DetectorMeasurements(trained, images, options or ConversionOptions(**DEFAULTS), evaluator, progress)
    return measurements.spiking, measure(measurements, origin or Origin())


def write_model(
    trained: Any,
    images: ImageSubset,
    folder: str | Path,
    options: ConversionOptions | None = None,
    origin: Origin | None = None,
    config: str | None = None,
    evaluator: Evaluator | None = None,
    progress: bool = True,
) -> Record:
    """Convert a trained detector or segmenter, measure it, and write packed weights, record and report.

    ``spiking.safetensors`` holds the trained model at its real precision: `qsd.load_packed` loads it into a model of
    the same configuration (which the file's notes hold), and `convert_model` converts that again.

    Args:
        trained: See `record_model`.
        images: See `record_model`.
        folder: Target folder; either all three files are complete, or none is written.
        options: See `record_model`.
        origin: See `record_model`.
        config: Text of the configuration.
        evaluator: See `record_model`.
        progress: See `record_model`.

    Raises:
        QsdError: See `record_model`; and if the files cannot be written or the packed one gives other predictions.
    """
    options, origin = options or ConversionOptions(**DEFAULTS), origin or Origin()
    classes = (getattr(trained, "dataset_meta", None) or {}).get("classes", ())
    notes = {"class_names": list(classes), "config": config}
    return write_measured(DetectorMeasurements(trained, images, options, evaluator, progress), origin, folder, notes)


def _metrics(evaluator: Evaluator) -> dict[str, float]:
    """Metrics of the processed samples, by this process alone: `Evaluator.evaluate` would wait for the others."""
    found: dict[str, float] = {}
    for metric in evaluator.metrics:
        for key, value in metric.compute_metrics(metric.results).items():
            # Classes and, by COCO's convention of -1, sizes of objects that do not occur have no value.
            if isinstance(value, Real) and math.isfinite(value) and value != -1:
                found[f"{metric.prefix}/{key}" if metric.prefix else key] = float(value)
        metric.results.clear()
    return found
