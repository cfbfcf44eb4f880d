"""The record of a conversion: everything that its report shows, as it is written to ``conversion.json``.

One form for classifiers, detectors and segmenters. Parts that a kind of network does not have are ``None`` or empty: a
detector has no sweep over delays, a classifier no segments.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from qsd.errors import QsdError
from qsd.report.activity_record import ActivityRecord
from qsd.report.costs import Count, EnergyRecord, EnergyTotals, Sizes
from qsd.report.options import Stage
from qsd.schema import Delay, Schema, Share, Size, TimeSteps, check_version, parse, read_object
from qsd.spiking.codes import CodeName
from qsd.spiking.merging import MergeChoice

VERSION = 1
REMEDY = "write it again with `qsd convert`"
Way = Literal["count", "simulate"]


class ModelFacts(Schema):
    """The network that was converted.

    Attributes:
        name: Its name.
        checkpoint: File that its weights come from.
        time_steps: T.
        weight_bits: Bits of its weights; several numbers are separated by commas, 32 stands for floats.
    """

    name: str
    checkpoint: str | None
    time_steps: TimeSteps
    weight_bits: str


class Data(Schema):
    """The images that were measured on.

    Attributes:
        description: Their number and origin in words.
        image_size: ``[C, H, W]``, or ``[F, C, H, W]`` of recordings.
    """

    description: str
    image_size: list[Size]


class Settings(Schema):
    """How the network was converted; see `qsd.report.ConversionOptions`."""

    merge: MergeChoice
    merged_bits: Annotated[int, Field(ge=2, le=16)] | None
    delay: Delay | dict[str, Delay] | None
    code: CodeName = "unary"


class ClassifierAccuracy(Schema):
    """Accuracy of a classifier, as shares from 0 to 1.

    Attributes:
        images: Number of images.
        way: Evaluation of the spiking network: ``"count"`` domain, or ``"simulate"`` time step by time step.
        dtype: Number format.
        float_twin: Accuracy of the float twin (``float`` in the file), if the user gave it.
        quantized: Accuracy of the trained network.
        spiking: Accuracy of the spiking network.
        class_agreement: Share of images for which both give the same class.
    """

    kind: Literal["classifier"] = "classifier"
    images: Size
    float_twin: Share | None = Field(validation_alias="float", serialization_alias="float")
    quantized: Share
    spiking: Share
    class_agreement: Share
    way: Way
    dtype: str


class Metric(Schema):
    """A metric of a data set, before and after conversion."""

    name: str
    quantized: float
    spiking: float


class DenseAccuracy(Schema):
    """Metrics of a detector or segmenter; none if not all images of the data set were measured.

    Attributes:
        images: Number of images.
        way: As in `ClassifierAccuracy`.
        dtype: Number format.
        metrics: The data set's metrics.
    """

    kind: Literal["detector", "segmenter"]
    images: Size
    way: Way
    dtype: str
    metrics: list[Metric]


class ComparedCounts(Schema):
    """Agreement of the trained and the spiking network; see `qsd.spiking.Comparison`.

    Attributes:
        largest_difference: Largest difference of coordinates (pixels), scores or logits of a detector or segmenter.
            ``None`` for a classifier, and if an image has another number of objects.
        other_regions: Images of a detector or segmenter that first differ after another choice of regions; ``None``
            for a classifier.
    """

    dtype: str
    way: Way
    images: Size
    changed_images: Size
    equal_classes: Size
    farthest_first_difference: float | None
    equal_counts: bool
    class_agreement: Share
    largest_difference: float | None = None
    other_regions: Size | None = None


class DelayRow(Schema):
    """Accuracy and time with one delay for all neurons."""

    delay: Delay
    accuracy: Share
    class_agreement: Share
    latency: Size
    interval: Size


class Delays(Schema):
    """Accuracy over the delay, from 0 to T - 1."""

    images: Size
    quantized_accuracy: Share
    rows: list[DelayRow]


class Latency(Schema):
    """Time steps from the first input to the last output, and between two images."""

    steps: Size
    interval: Size


class NeuronActivity(Schema):
    """Spikes of one neuron layer.

    Attributes:
        name: Dotted name of the layer.
        size: Number of neurons per image.
        rate: Spikes per neuron and time step.
        histogram: Share of neurons by spike count, from 0 to T.
    """

    name: str
    size: Size
    rate: Share
    histogram: list[float]


class Raster(Schema):
    """Binary spikes of some neurons of a layer, by image, time step and neuron."""

    name: str
    neurons: Size
    spikes: list[list[list[Literal[0, 1]]]]


class AuditedOperation(Schema):
    """What one operation was given; see `qsd.spiking.audit.AuditedOperation`."""

    name: str
    operation: str
    status: Literal["binary", "integer", "analog", "unproven"]
    bits: Size | None
    stem: bool
    note: str
    spike_driven: bool
    shift: Size = 0


class AuditRecord(Schema):
    """The audit of all operations."""

    images: Size
    spike_driven: bool
    operations: list[AuditedOperation]


class Segment(Schema):
    """A part of a detector or segmenter that runs on spikes between two decisions that are not spiking.

    Attributes:
        name: Its name.
        latency: Time steps from its first input to its last output.
        interval: Time steps between two inputs.
        inputs: Number of inputs per image: 1 for the image, the number of regions for a region head.
        energy_mj: Energy per image; ``None`` if it was not measured.
    """

    name: str
    latency: Size
    interval: Size
    inputs: Count
    energy_mj: EnergyTotals | None


class Record(Schema):
    """Everything that was measured of a conversion.

    Attributes:
        version: Version of this form.
        qsd: Version of the package that measured.
        left_out: Stages that were not measured.
        model: The network.
        data: The images.
        conversion: How it was converted.
        accuracy: Accuracy or metrics before and after.
        comparison: Spike counts and predictions against the trained network.
        delays: Accuracy over the delay.
        latency: Time from input to output.
        neurons: Spikes by layer, in the order of execution.
        raster: Spikes of one layer.
        audit: What every operation was given.
        energy: Operations and energy.
        sizes: Bytes of the weights.
        segments: Parts of a detector or segmenter.
        activity: Where and when the network fires for the first image; ``None`` in records of earlier versions.
    """

    version: Literal[1] = 1
    qsd: str
    left_out: list[Stage]
    model: ModelFacts
    data: Data
    conversion: Settings
    accuracy: Annotated[ClassifierAccuracy | DenseAccuracy, Field(discriminator="kind")]
    comparison: list[ComparedCounts]
    delays: Delays | None
    latency: Latency
    neurons: list[NeuronActivity]
    raster: Raster | None
    audit: AuditRecord | None
    energy: EnergyRecord | None
    sizes: Sizes
    segments: list[Segment]
    activity: ActivityRecord | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return self.model_dump(mode="json", by_alias=True)

    def to_json(self) -> str:
        """The text of ``conversion.json``."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "the record") -> "Record":
        """Read what `to_json` wrote, or version 0.1.0 of the package.

        Args:
            text: Text of a ``conversion.json``.
            source: Name of the file, for the message.

        Raises:
            QsdError: If the text is no record, is of a newer version, or has a field that does not fit.
        """
        content = read_object(text, source, REMEDY)
        check_version(content, VERSION, source)
        return parse(cls, content if "version" in content else _from_first_release(content), source, REMEDY)

    @classmethod
    def read(cls, path: str | Path) -> "Record":
        """Read a ``conversion.json``.

        Args:
            path: The file.

        Raises:
            QsdError: If it cannot be read; see `from_json`.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise QsdError(f"{path} cannot be read: {error.strerror or error}.") from error
        return cls.from_json(text, str(path))


def _from_first_release(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a ``conversion.json`` of 0.1.0, which has no version, in today's form."""
    new = {**content, "version": VERSION}
    conversion, accuracy = content.get("conversion"), content.get("accuracy")
    if isinstance(conversion, dict) and isinstance(conversion.get("merge"), bool):
        new["conversion"] = {**conversion, "merge": "all" if conversion["merge"] else "none"}
    if isinstance(accuracy, dict):
        dense = "segmenter" if "decode_head." in str(content.get("audit")) + str(content.get("neurons")) else "detector"
        new["accuracy"] = {"kind": dense if "metrics" in accuracy else "classifier", **accuracy}
    return new
