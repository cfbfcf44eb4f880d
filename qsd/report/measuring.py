"""Conversion and its measurements, step by step, for every kind of network and every training framework.

The steps are the same everywhere: convert, measure accuracy, compare spike counts, audit, count energy, write the
packed file and read it back, write record and page. A subclass of `Measurements` implements each step for one kind of
network: for classifiers in `qsd.report.classifier`, for detectors and segmenters in ``qsd.mm.spiking.measuring``.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import qsd
from qsd.distributed import from_first_process
from qsd.energy import Energy
from qsd.errors import QsdError
from qsd.files import replacing_together
from qsd.packing import ModelSize
from qsd.precision import full_float32
from qsd.quantizers import StepSizeQuantizer
from qsd.report import record as records
from qsd.report.activity_record import ActivityRecord
from qsd.report.costs import EnergyRecord, Sizes
from qsd.report.files import FILES, write_record
from qsd.report.options import STAGES, ConversionOptions
from qsd.report.record import Record
from qsd.spiking import Audit, Comparison
from qsd.spiking.codes import Code

PACKED = FILES[0]


@dataclass(frozen=True)
class Origin:
    """Where network and images come from, for the report.

    Attributes:
        name: Name of the network.
        checkpoint: File of its weights.
        source: Description of the images, such as "validation images of DigitsData".
    """

    name: str = "the network"
    checkpoint: str | None = None
    source: str = "images"


class SpikeActivity:
    """Histograms of spike counts by neuron layer, added up over all batches.

    Args:
        code: How the counts travel as spikes.
    """

    def __init__(self, code: Code) -> None:
        self.code = code
        self.histograms: dict[str, Tensor] = {}

    def __call__(self, name: str, counts: Tensor) -> None:
        histogram = torch.bincount(counts.flatten().long(), minlength=self.code.largest + 1).cpu()
        self.histograms[name] = self.histograms.get(name, torch.zeros_like(histogram)) + histogram

    def neurons(self, images: int) -> list[records.NeuronActivity]:
        """One entry per neuron layer, in the order of execution.

        Args:
            images: Number of images, or frames, that were evaluated in all.
        """
        found, spikes_of_count = [], self.code.ones(torch.arange(self.code.largest + 1))
        for name, histogram in self.histograms.items():
            total = int(histogram.sum())
            spikes = int((histogram * spikes_of_count).sum())
            rate, shares = spikes / (total * self.code.steps), (histogram / total).tolist()
            found.append(records.NeuronActivity(name=name, size=total // images, rate=rate, histogram=shares))
        return found


class Measurements(ABC):
    """A trained network, its spiking form, and the measurements that a kind of network takes.

    Args:
        trained: Trained network; it is not changed.
        options: How to convert and what to measure.
        progress: Whether to show progress bars.

    Raises:
        QsdError: If the network cannot be converted, or has no such stage.
    """

    stages: ClassVar[tuple[str, ...]] = STAGES
    spiking: Any

    def __init__(self, trained: nn.Module, options: ConversionOptions, progress: bool) -> None:
        options.check_stages(self.stages)
        # The copy is not compiled, and stays in evaluation.
        self.trained: Any = copy.deepcopy(trained).eval()
        self.options, self.progress = options, progress
        self.spiking = self.convert(self.trained, options.delay)

    @property
    @abstractmethod
    def image_size(self) -> list[int]:
        """``[C, H, W]`` of the images."""

    @abstractmethod
    def convert(self, trained: Any, delay: int | dict[str, int] | None) -> Any:
        """Convert a network.

        Args:
            trained: The trained network, of any floating-point type.
            delay: As in `qsd.to_spike_driven`.
        """

    @abstractmethod
    def accuracy(self, count: Callable[[str, Tensor], None]) -> records.ClassifierAccuracy | records.DenseAccuracy:
        """Accuracy of the trained and the spiking network.

        Args:
            count: Receives the name and the spike counts of every neuron layer that the spiking network runs.
        """

    @abstractmethod
    def compare(self, trained: Any, spiking: Any, way: Literal["count", "simulate"]) -> Comparison:
        """Compare spike counts and predictions.

        Args:
            trained: The trained network, of any floating-point type.
            spiking: Converted from it.
            way: Count domain, or simulation of `ConversionOptions.stepped_images` images.
        """

    @abstractmethod
    def audit(self) -> Audit:
        """Check the input of every operation, on `ConversionOptions.stepped_images` images."""

    @abstractmethod
    def energy(self) -> Energy:
        """Count operations and energy."""

    @abstractmethod
    def sizes(self) -> ModelSize:
        """Bytes of the weights."""

    @abstractmethod
    def pack(self, path: Path, notes: Mapping[str, Any]) -> None:
        """Write the packed file, read it back, and check that it gives the same output.

        Args:
            path: The file.
            notes: Further facts to store in it.

        Raises:
            QsdError: If the output differs.
        """

    def delays(self) -> records.Delays | None:
        """Accuracy over the delay, for kinds of networks that measure it."""
        return None

    def raster(self) -> records.Raster | None:
        """Spikes of one neuron layer, for kinds of networks that draw them."""
        return None

    def pictures(self) -> ActivityRecord | None:
        """Where and when the network fires for the first image, for kinds of networks that draw it."""
        return None

    def segments(self) -> list[records.Segment]:
        """The parts of a network that is converted part by part."""
        return []


@torch.no_grad()
@full_float32()
def measure(measurements: Measurements, origin: Origin) -> Record:
    """Run all measurements that the options ask for.

    Args:
        measurements: The network and its measurements.
        origin: Where network and images come from.

    Raises:
        QsdError: If a measurement is impossible, for example for want of labels.
    """
    options, spiking = measurements.options, measurements.spiking
    wanted = set(options.stages)
    activity = SpikeActivity(spiking.code) if "activity" in wanted else None
    accuracy = measurements.accuracy(activity or (lambda _name, _counts: None))
    audit = measurements.audit() if "audit" in wanted else None
    energy = measurements.energy() if "energy" in wanted else None
    return Record(
        qsd=qsd.__version__,
        left_out=[stage for stage in STAGES if stage in measurements.stages and stage not in wanted],
        model=records.ModelFacts(
            name=origin.name,
            checkpoint=origin.checkpoint,
            time_steps=spiking.time_steps,
            weight_bits=weight_bits(measurements.trained),
        ),
        data=records.Data(description=f"{accuracy.images} {origin.source}", image_size=measurements.image_size),
        conversion=_settings(options),
        accuracy=accuracy,
        comparison=_comparison(measurements) if "compare" in wanted else [],
        delays=measurements.delays() if "delays" in wanted else None,
        latency=records.Latency(steps=spiking.latency(), interval=spiking.interval()),
        neurons=[] if activity is None else activity.neurons(accuracy.images * getattr(spiking, "frames", 1)),
        raster=None if activity is None else measurements.raster(),
        audit=None if audit is None else records.AuditRecord.model_validate(audit.to_dict()),
        energy=None if energy is None else EnergyRecord.model_validate(energy.to_dict()),
        sizes=Sizes(**asdict(measurements.sizes())),
        segments=measurements.segments(),
        activity=None if activity is None else measurements.pictures(),
    )


def write_measured(
    measurements: Measurements, origin: Origin, folder: str | Path, notes: Mapping[str, Any] | None = None
) -> Record:
    """Measure, and write packed file, record and page; either all three files are complete, or none is written.

    Args:
        measurements: The network and its measurements.
        origin: Where network and images come from.
        folder: Target folder; it is made if it does not exist. Files of an earlier conversion are replaced.
        notes: Further facts to store in the packed file.

    Raises:
        QsdError: If a measurement is impossible, the files cannot be written, or the packed file gives another output.
    """
    with replacing_together(folder) as partial:
        record = measure(measurements, origin)
        measurements.pack(partial / PACKED, notes or {})
        return write_record(record, partial, partial / PACKED)


def convert_after_training(write: Callable[[], Record], first_process: bool, checkpoint: Path | None) -> Record | None:
    """Let the first process convert at the end of a training while the others wait; a failure loses no weights.

    Args:
        write: Loads the best weights, converts them and writes the files.
        first_process: Whether this process is the first one.
        checkpoint: File with the trained weights, for the message.

    Returns:
        The record, in the first process.

    Raises:
        QsdError: In every process, if the first one failed; the message names the checkpoint.
    """
    record, problem, cause = None, None, None
    if first_process:
        try:
            record = write()
        except Exception as error:  # The training must not be lost, and the other processes are waiting.
            reason = str(error) if isinstance(error, QsdError) else f"{type(error).__name__}: {error}"
            safe = f"the trained network is safe in {checkpoint}, but its" if checkpoint else "the trained network's"
            problem, cause = f"{safe} conversion failed: {reason}", error
    problem = from_first_process(problem)
    if problem is not None:
        raise QsdError(problem) from cause
    return record


def metrics(record: Record) -> dict[str, float]:
    """The main figures of a record by name, for loggers.

    Args:
        record: What a conversion measured.
    """
    accuracy = record.accuracy
    found: dict[str, float] = {
        "latency_steps": record.latency.steps,
        "packed_bytes": record.sizes.packed_bytes,
    }
    if isinstance(accuracy, records.DenseAccuracy):
        found |= {metric.name: metric.spiking for metric in accuracy.metrics}
    else:
        found["accuracy"], found["quantized_accuracy"] = accuracy.spiking, accuracy.quantized
        found["class_agreement"] = accuracy.class_agreement
    for compared in record.comparison:
        found[f"changed_images_{compared.dtype}_{compared.way}"] = compared.changed_images / compared.images
    for row in record.delays.rows if record.delays else ():
        found[f"accuracy_delay_{row.delay}"] = row.accuracy
    if record.energy:
        found |= {f"energy_{key}_mj": mj for key, mj in record.energy.total_mj.model_dump().items() if mj is not None}
    if record.audit:
        found["spike_driven"] = record.audit.spike_driven
    return {f"spiking/{key}": float(value) for key, value in found.items()}


def weight_bits(trained: nn.Module) -> str:
    """Bits of a network's weights in words: ``"4"``, ``"4, 8"``, or ``"32"`` for floats.

    Args:
        trained: Quantized or float network.
    """
    bits = sorted({m.bits for m in trained.modules() if isinstance(m, StepSizeQuantizer)})
    return ", ".join(map(str, bits)) or "32"


def _settings(options: ConversionOptions) -> records.Settings:
    names = ("merge", "merged_bits", "delay", "code")
    return records.Settings.model_validate({name: getattr(options, name) for name in names})


def _comparison(measurements: Measurements) -> list[records.ComparedCounts]:
    """Compare in float64, both ways, and in float32, with the lossless delay."""
    found = []
    ways: tuple[Literal["count", "simulate"], ...]
    for dtype, ways in ((torch.float64, ("count", "simulate")), (torch.float32, ("count",))):
        trained = copy.deepcopy(measurements.trained).to(dtype)
        spiking = measurements.convert(trained, None)
        for way in ways:
            compared = measurements.compare(trained, spiking, way)
            found.append(records.ComparedCounts.model_validate(compared.to_dict()))
    return found
