"""Formats of event cameras, by the readers of tonic and aedat, which `qsd[events]` installs.

These readers trust their files, so damage is looked for here first.
"""

import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from qsd.errors import QsdError

Array = np.ndarray[Any, Any]
# The layout of a file where its ending does not tell it: ``dvs128`` and ``ibm`` are addresses in ``.aedat`` files, and
# ``gesture`` is an array of columns x, y, polarity and milliseconds.
EventFormat = Literal["auto", "dvs128", "ibm", "gesture"]
# Places of column, row and polarity in the addresses of ``.aedat`` files, and the mask of the first two.
_ADDRESSES = {"dvs128": ((8, 1, 0), 0x7F), "ibm": ((17, 2, 1), 0x1FFF)}
_FIRST_LINE = b"#!AER-DAT4.0\r\n"


class NoRecording(Exception):
    """The reason why a file holds no recording."""


@contextmanager
def needed(package: str) -> Iterator[None]:
    """Tell how to install a package that is missing.

    Args:
        package: Its name.

    Raises:
        QsdError: If an import in the block fails.
    """
    try:
        yield
    except ImportError as error:
        raise QsdError(f"reading such recordings needs {package}: pip install 'qsd[events]'.") from error


def read_aedat(path: str, layout: EventFormat) -> tuple[Mapping[str, Array], str | None]:
    """Read an ``.aedat`` file of version 2 or 3.

    Args:
        path: The file.
        layout: Layout of its addresses; those of a DVS128 unless it is ``"ibm"``.

    Returns:
        Lists x, y, t and p by name, and the unit of the times.

    Raises:
        NoRecording: If the file is damaged.
        QsdError: If tonic is missing.
    """
    with needed("tonic"):
        from tonic import io
    # Neither by `io.read_dvs_128`, which fails in tonic 1.7, nor by its reader of headers, which fails on dates.
    version, start = _aedat_header(path)
    events = io.get_aer_events_from_file(path, version, start)
    address, (x, y, p), mask = events["address"].astype(np.int64), *_ADDRESSES["ibm" if layout == "ibm" else "dvs128"]
    fields = {"x": address >> x & mask, "y": address >> y & mask, "p": address >> p & 1}
    return {**fields, "t": events["timeStamp"]}, "us"


def _aedat_header(path: str) -> tuple[float, int]:
    """Version of an ``.aedat`` file, and the place of its first event; a truncated file is refused."""
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        version = re.match(rb"#!AER-DAT(2\.\d|3\.[1-9])\s", stream.readline(64))
        if version is None:
            raise NoRecording("it does not begin with #!AER-DAT2.0 or #!AER-DAT3.1, as an .aedat file does")
        start = stream.tell()
        while stream.readline().startswith(b"#"):
            start = stream.tell()
        if version[1] < b"3":  # events of 8 bytes
            end = size - (size - start) % 8
        else:  # packets of such events, each behind a header of 28 bytes
            end = start
            while end < size:
                stream.seek(end + 16)
                end += 28 + 8 * int.from_bytes(stream.read(4), "little")
    if end != size:
        raise NoRecording("the file is truncated")
    return float(version[1]), start


def read_aedat4(path: str, layout: EventFormat) -> tuple[Mapping[str, Array], str | None]:
    """Read an ``.aedat4`` file.

    Args:
        path: The file.
        layout: Of no effect.

    Returns:
        Lists x, y, t and p by name, and the unit of the times.

    Raises:
        NoRecording: If the file is damaged.
        QsdError: If tonic or aedat is missing.
    """
    del layout
    with needed("tonic"):
        import aedat  # noqa: F401 - which tonic asks for only when it reads
        from tonic import io
    _check_aedat4(path)
    events = io.read_aedat4(path)
    names = ("on" if "on" in events.dtype.names else "p", "x", "y", "t")
    return {"p": events[names[0]], **{name: events[name] for name in names[1:]}}, "us"


def _check_aedat4(path: str) -> None:
    """Refuse a damaged file at which the decoder, which is written in Rust, ends the process or takes all memory.

    Behind the first line lie a FlatBuffer and packets, each with its length in front of it, and perhaps a table, whose
    place the FlatBuffer holds.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        if stream.read(len(_FIRST_LINE)) != _FIRST_LINE:
            raise NoRecording("it does not begin with #!AER-DAT4.0, as an .aedat4 file does")
        header = stream.read(min(int.from_bytes(stream.read(4), "little"), size))
        try:
            table = _table_place(header)
        except (struct.error, UnicodeDecodeError):
            raise NoRecording("its header is damaged") from None
        place, end = stream.tell(), table if table > 0 else size
        while place < end <= size:
            stream.seek(place + 4)  # behind the number of a stream
            place += 8 + int.from_bytes(stream.read(4), "little")
    if place != end:
        raise NoRecording("the file is truncated")


def _table_place(header: bytes) -> int:
    """The place of the table in an ``.aedat4`` file, from its header; the text of the header has to be UTF-8."""

    def number(kind: str, place: int) -> int:
        return int(struct.unpack_from(f"<{kind}", header, place)[0])

    start = number("I", 0)
    fields = start - number("i", start)
    text = start + number("H", fields + 8)
    text += number("I", text)
    str(header[text + 4 : text + 4 + number("I", text)], "utf-8")
    position = number("H", fields + 6)
    return number("q", start + position) if position else -1


def read_bin(path: str, layout: EventFormat) -> tuple[Mapping[str, Array], str | None]:
    """Read a ``.bin`` file of N-MNIST or N-Caltech101: five bytes for an event.

    Args:
        path: The file.
        layout: Of no effect.

    Returns:
        Lists x, y, t and p by name, and the unit of the times.

    Raises:
        NoRecording: If the file is damaged.
        QsdError: If tonic is missing.
    """
    del layout
    if os.path.getsize(path) % 5:
        raise NoRecording("its length is no multiple of 5 bytes, so that it is truncated, or no recording of N-MNIST")
    with needed("tonic"):
        from tonic import io
    events = io.read_mnist_file(path, np.dtype([("x", int), ("y", int), ("t", int), ("p", int)]))
    return {name: events[name] for name in "xytp"}, "us"
