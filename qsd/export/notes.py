"""The note in an ONNX file's metadata: the kind of file, its time steps and image size, and facts about the images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from qsd.errors import QsdError
from qsd.schema import Schema, Size, TimeSteps, check_version, parse_json, read_object

KEY = "qsd"  # The entry of the ONNX metadata that holds the note, as JSON.

VERSION = 1
_REMEDY = "write the file again with qsd export"


class OnnxNote(Schema):
    """The note of an ONNX file, as JSON; files of 0.1.0 have the same one without a version.

    Attributes:
        version: Version of this form.
        kind: Numbers that the network computes with.
        time_steps: T.
        image: ``[C, H, W]``.
        inner: Smallest and largest step size and zero point of the grids of inner activations, by name.
        notes: Further facts, such as names of classes.
        frames: Frames of a recording; ``None`` for a network of images.
    """

    version: Literal[1] = 1
    kind: Literal["float", "integer"]
    time_steps: TimeSteps
    image: Annotated[list[Size], Field(min_length=3, max_length=3)]
    inner: dict[str, tuple[float, float, int]]
    notes: dict[str, Any]
    frames: Size | None = None


def check_notes(notes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Facts of the user in the form in which a file returns them.

    Args:
        notes: Facts to store in a file, such as class names; ``None`` for no facts.

    Raises:
        QsdError: If they cannot be written as JSON.
    """
    try:
        return json.loads(json.dumps(dict(notes or {})))
    except (TypeError, ValueError) as error:
        raise QsdError(f"the notes of a file must be JSON, but a value is no JSON: {error}.") from error


def write_note(
    kind: str,
    time_steps: int,
    image: Sequence[int],
    grids: Mapping[str, Any],
    notes: Mapping[str, Any],
    frames: int | None = None,
) -> dict[str, str]:
    """The metadata entries of an ONNX file.

    Args:
        kind: ``"float"`` or ``"integer"``.
        time_steps: Time steps T of the network.
        image: Image size ``(C, H, W)``.
        grids: Grids of the inner activations by name (`qsd.export.grids.Grid`); empty for floats.
        notes: Further facts, see `check_notes`.
        frames: Frames of a recording; ``None`` for images.
    """
    inner = {name: (float(g.unit.min()), float(g.unit.max()), int(g.zero_point)) for name, g in grids.items()}
    header = OnnxNote.model_validate(
        {
            "kind": kind,
            "time_steps": time_steps,
            "image": list(image),
            "inner": inner,
            "notes": dict(notes),
            "frames": frames,
        }
    )
    # Notes of networks of images have no frames, so that versions before them read the file.
    return {KEY: json.dumps(header.model_dump(exclude=set() if frames else {"frames"}))}


def read_note(metadata: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    """The note of an ONNX file that `to_onnx` wrote.

    Args:
        metadata: Metadata entries of the file, such as ``session.get_modelmeta().custom_metadata_map``.
        path: The file, for the message of the error.

    Returns:
        ``kind``, ``time_steps``, ``image``, ``inner`` and ``notes``.

    Raises:
        QsdError: If the file has no note, or one of a newer version, or one with a field that does not fit.
    """
    if KEY not in metadata:
        raise QsdError(f"{path} was not written by qsd.export; write it with qsd export.")
    source = f"the note of ONNX file {path}"
    check_version(read_object(metadata[KEY], source, _REMEDY), VERSION, source)
    return parse_json(OnnxNote, metadata[KEY], source, _REMEDY).model_dump()
