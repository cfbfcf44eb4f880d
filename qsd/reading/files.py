"""Which kind of file a path leads to, and what a file holds that has the wrong name."""

import os
import stat
from pathlib import Path

from qsd.errors import QsdError, printable

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# How files of other programs begin. The order matters: the first entry that fits is taken.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"BZh", "a bzip2 archive; unpack it"),
    (b"\xfd7zXZ\x00", "an xz archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"GGUF", "a GGUF file (llama.cpp)"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"#!", "a script"),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file itself; fetch it with git lfs pull"),
    (b"<!doctype html", "a web page; the download has failed"),
    (b"<html", "a web page; the download has failed"),
    (b"<?xml", "an XML document"),
    (b"RIFF", "a RIFF file (WebP, sound or video)"),
)
_HEAD = 4096  # bytes that are looked at


class FileError(QsdError):
    """A file that is missing, of another kind, or damaged."""


def regular_file(path: str | Path, noun: str = "file") -> Path:
    """Refuse a path that is missing or that is no regular file: a pipe would block the reader for ever.

    Args:
        path: Path of the file.
        noun: Name of the file's role in messages, such as "checkpoint".

    Returns:
        The path.

    Raises:
        FileError: If the path does not exist, cannot be reached, or leads to a folder, pipe, socket or device.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise FileError(f"{noun} {path} does not exist.") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"{noun} {str(path)!r} cannot be reached: {reason}.") from error
    if stat.S_ISREG(mode):
        return path
    kind = next((kind for test, kind in _KINDS if test(mode)), "no regular file")
    raise FileError(f"{path} is no file: it is {kind}.")


def shown(path: object) -> str:
    """A path or name as one printable line, see `qsd.errors.printable`.

    Args:
        path: A path, or any name out of a file.
    """
    return printable(os.fspath(path) if isinstance(path, os.PathLike) else str(path))


def read_head(path: Path, count: int = _HEAD) -> bytes:
    """The first bytes of a regular file.

    Args:
        path: Path of a regular file.
        count: Number of bytes at most.

    Raises:
        FileError: If the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from error


def describe(path: Path) -> str | None:
    """Name the contents of a regular file by its first bytes, for the message that refuses it.

    Args:
        path: Path of a regular file.

    Returns:
        A noun phrase such as "a PNG image", or ``None`` where the contents are not recognised.
    """
    head = read_head(path)
    if not head:
        return "an empty file"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive"
    # A safetensors file begins with the length of its header (8 bytes) and the header, a JSON object.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "a safetensors file"
    if (
        head[:1] == b"\x08"
        and b"\x00" < head[1:2] < b"\x20"
        and (b"pytorch" in head or b"qsd" in head or b"onnx" in head)
    ):
        return "an ONNX file"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle"
    start = head.lstrip()[:64]
    known = next(
        (kind for magic, kind in _BEGINNINGS if head.startswith(magic) or start.lower().startswith(magic)), None
    )
    return known or _describe_text(head)


def _describe_text(head: bytes) -> str | None:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or len(head) < _HEAD:  # else a character is cut off by the end of the head
            return None
        text = head[: error.start].decode("utf-8")
    if not all(character.isprintable() or character in "\t\r\n\f" for character in text):
        return None
    return "a JSON document" if text.lstrip()[:1] in ("{", "[") else "a text file"
