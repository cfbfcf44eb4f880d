"""The parts of a checkpoint, each with the type that its reader relies on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from qsd.reading.files import FileError

T = TypeVar("T")

_NOUNS = {dict: "a dictionary", str: "a text", list: "a list", int: "a number"}
_REQUIRED: Any = object()


def part_of(content: Any, name: str, kind: type[T], source: str | Path, default: Any = _REQUIRED) -> T:
    """Take a part out of the contents of a file.

    Args:
        content: Contents of the file.
        name: Keys that lead to the part, joined by dots: ``"meta.cfg"``.
        kind: Type that the part must have.
        source: The file, for messages.
        default: Value in place of a part that is missing or ``None``; without it such a part is an error.

    Raises:
        FileError: If the part is missing or has another type.
    """
    found, path = content, ""
    for key in name.split("."):
        if not isinstance(found, Mapping):
            raise _other_type(source, path, found, dict)
        path = f"{path}.{key}" if path else key
        found = found.get(key)
        if found is None:
            if default is _REQUIRED:
                raise FileError(
                    f"{source} has no part {path!r}; it was written by another program, or for another use."
                )
            return default
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise _other_type(source, path, found, kind)
    return found


def _other_type(source: str | Path, path: str, found: Any, kind: type) -> FileError:
    where = f"its part {path!r}" if path else "its content"
    return FileError(
        f"{source} cannot be used: {where} is of type {type(found).__name__}, where {_NOUNS.get(kind, kind.__name__)} "
        "belongs."
    )
