"""Reading safetensors files, whose headers are compared with the file before memory is allocated."""

import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qsd.reading.files import FileError, describe, regular_file

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes, the format's own limit


def read_safetensors(path: str | Path, noun: str = "file") -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and the tensors of a safetensors file.

    Args:
        path: Path of the file.
        noun: Name of the file's role in messages.

    Returns:
        Texts by key, and tensors by name, on the CPU.

    Raises:
        FileError: If the file is missing, damaged, or no safetensors file.
    """
    path = regular_file(path, noun)
    metadata = check_safetensors(path, noun)
    try:
        return metadata, safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise _damaged(path, noun, str(error)) from error


def check_safetensors(path: str | Path, noun: str = "file") -> dict[str, str]:
    """Check the header of a safetensors file: types, shapes, and positions that fill the file without gap or overlap.

    Args:
        path: Path of the file.
        noun: Name of the file's role in messages.

    Returns:
        The file's metadata.

    Raises:
        FileError: If the file is missing, damaged, or no safetensors file.
    """
    path = regular_file(path, noun)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if 2 <= length <= min(size - 8, _MAX_HEADER) else b""
    except OSError as error:
        raise FileError(f"{noun} {path} cannot be read: {error.strerror or error}.") from error
    if not header.startswith(b"{"):
        found = describe(path)
        other = f" (it is {found})" if found and found != "a safetensors file" else ""
        raise FileError(f"{noun} {path} cannot be read: it is damaged, incomplete or no safetensors file{other}.")
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, noun, "its header is no JSON") from error
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(path, noun, "its metadata are no texts")
    _check_entries(path, noun, entries, size - 8 - length)
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise _damaged(path, noun, str(error)) from error
    return metadata


def _check_entries(path: Path, noun: str, entries: dict[str, Any], available: int) -> None:
    spans = []
    for name, entry in entries.items():
        try:
            bits, shape, (start, end) = _BITS[entry["dtype"]], entry["shape"], entry["data_offsets"]
            whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, start, end))
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(
                path, noun, f"the entry of its tensor {name!r} lacks a known dtype, shape or position"
            ) from error
        if not whole or (end - start) * 8 != math.prod(shape) * bits:
            raise _damaged(path, noun, f"its tensor {name!r} has a shape that does not fit its bytes")
        spans.append((start, end))
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise _damaged(path, noun, "its tensors leave gaps or overlap")
        position = end
    if position != available:
        raise _damaged(path, noun, f"it has {available} bytes of tensors where its header tells {position}")


def _damaged(path: Path, noun: str, reason: str) -> FileError:
    return FileError(f"{noun} {path} cannot be read: it is damaged or incomplete ({' '.join(reason.split())[:200]}).")
