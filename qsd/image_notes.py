"""Facts about a network's images that exported files store, for whoever runs them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from qsd.errors import QsdError
from qsd.schema import Schema, parse

_REMEDY = "write it with qsd export"
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_Channels = Annotated[list[float], Field(min_length=1, max_length=64)]
_Deviations = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1, max_length=64)]
_Side = Annotated[int, Field(ge=1, le=2**14)]


class RecordingNotes(Schema):
    """Facts about the recordings of an event camera, which tell how their events become frames.

    Attributes:
        frames: Number of frames.
        bin_ms: Length of a bin in milliseconds; ``None`` for equal parts of each recording.
        sensor: Height and width of the sensor; ``None`` for those of each recording.
        layout: Layout of files whose ending does not tell it.
        time_unit: Unit of the times in structured arrays.
        denoise_ms: Time within which an event needs another one beside it; ``None`` for any.
    """

    frames: Annotated[int, Field(ge=1, le=1024)]
    bin_ms: Annotated[float, Field(gt=0)] | None = None
    sensor: Annotated[list[_Side], Field(min_length=2, max_length=2)] | None = None
    layout: Literal["auto", "dvs128", "ibm", "gesture"] = "auto"
    time_unit: Literal["us", "ms", "s", "ns"] = "us"
    denoise_ms: Annotated[float, Field(gt=0)] | None = None


class ImageNotes(Schema):
    """Facts about images; a file may hold further ones, which are not checked.

    Attributes:
        class_names: Names of the classes.
        mean: Mean by channel for the normalisation.
        std: Standard deviation by channel for the normalisation.
        img_size: Height and width of the network's images.
        crop_pct: Share of the resized image that is cropped.
        interpolation: Name of the interpolation for resizing.
        exif_orientation: Whether images are turned as their EXIF orientation asks.
        energy_mj: Energy per image in mJ by convention, measured at the export.
        recordings: Facts about recordings; ``None`` for images.
    """

    model_config = ConfigDict(extra="ignore")

    class_names: list[str] | None = None
    mean: _Channels
    std: _Deviations
    img_size: Annotated[list[_Side], Field(min_length=2, max_length=2)]
    crop_pct: Annotated[float, Field(gt=0, le=2)] = 1.0
    interpolation: Interpolation = "bilinear"
    exif_orientation: Literal["upright", "ignore"] = "upright"
    energy_mj: dict[str, float | None] = Field(default_factory=dict)
    recordings: RecordingNotes | None = None


def read_image_notes(notes: Mapping[str, Any], path: str | Path) -> ImageNotes:
    """Check the facts about images in the notes of an exported file.

    Args:
        notes: The file's notes.
        path: The file, for the message.

    Raises:
        QsdError: If size or normalisation of the images are missing, or a fact does not fit.
    """
    missing = [key for key in ("mean", "std", "img_size") if key not in notes]
    if missing:
        raise QsdError(f"{path} does not hold the {missing[0]} of its images; {_REMEDY}.")
    facts = parse(ImageNotes, notes, f"the notes of {path}", _REMEDY)
    if len(facts.mean) != len(facts.std):
        raise QsdError(f"the notes of {path} have {len(facts.mean)} means for {len(facts.std)} deviations; {_REMEDY}.")
    return facts
