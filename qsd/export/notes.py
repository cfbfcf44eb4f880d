"""The note in an ONNX file's metadata: the kind of file, its time steps and image size, and facts about the images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsd.errors import QsdError

KEY = "qsd"  # The entry of the ONNX metadata that holds the note, as JSON.


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
) -> dict[str, str]:
    """The metadata entries of an ONNX file.

    Args:
        kind: ``"float"`` or ``"integer"``.
        time_steps: Time steps T of the network.
        image: Image size ``(C, H, W)``.
        grids: Grids of the inner activations by name (`qsd.export.grids.Grid`); empty for floats.
        notes: Further facts, see `check_notes`.
    """
    header = {
        "kind": kind,
        "time_steps": time_steps,
        "image": list(image),
        "inner": {name: [float(g.unit.min()), float(g.unit.max()), g.zero_point] for name, g in grids.items()},
        "notes": dict(notes),
    }
    return {KEY: json.dumps(header)}


def read_note(metadata: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    """The note of an ONNX file that `to_onnx` wrote.

    Args:
        metadata: Metadata entries of the file, such as ``session.get_modelmeta().custom_metadata_map``.
        path: The file, for the message of the error.

    Returns:
        ``kind``, ``time_steps``, ``image``, ``inner`` and ``notes``.

    Raises:
        QsdError: If the file has no note.
    """
    if KEY not in metadata:
        raise QsdError(f"{path} was not written by qsd.export; write it with qsd export.")
    return json.loads(metadata[KEY])
