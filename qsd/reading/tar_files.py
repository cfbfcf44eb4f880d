"""Where the files of a tar archive lie, so that each of them can be read alone.

Only the headers of an archive are read. Links, pipes and devices in it are passed over, nothing is unpacked, and no
name in an archive is opened as a path.
"""

import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qsd.reading.files import FileError, describe, regular_file

logger = logging.getLogger(__name__)


class Member(NamedTuple):
    """A file within an archive.

    Attributes:
        name: Its name in the archive.
        offset: First byte of its content in the archive.
        size: Number of bytes.
    """

    name: str
    offset: int
    size: int


def tar_members(path: str | Path) -> Iterator[Member]:
    """The regular files of an archive, in their order; of an archive in the archive, its files.

    Args:
        path: Path of an archive that is not compressed.

    Raises:
        FileError: If it is missing, compressed, damaged or cut off.
    """
    path = regular_file(path, "tar file")
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for member in _members(path, archive):
                if member.offset + member.size > size:
                    raise FileError(f"tar file {path} is cut off within {member.name}; use another copy of it.")
                yield member
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        found = describe(path)
        other = f" (it is {found})" if found else ""
        raise FileError(f"tar file {path} cannot be read: {' '.join(str(error).split())}{other}.") from error


def read_member(path: str | Path, offset: int, size: int) -> bytes:
    """The content of a file in an archive.

    Args:
        path: Path of the archive.
        offset: First byte of the content.
        size: Number of bytes.

    Raises:
        OSError: If the archive cannot be read.
    """
    # A new descriptor each time: processes that share one would share its position.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        os.lseek(descriptor, offset, os.SEEK_SET)
        content = os.read(descriptor, size)
        while len(content) < size and (more := os.read(descriptor, size - len(content))):
            content += more
        return content
    finally:
        os.close(descriptor)


def _check_end(path: Path, archive: Any) -> None:
    """Tell the end of an archive, which zeros mark, from a damaged header, at which `tarfile` ends without a word."""
    archive.fileobj.seek(archive.offset)
    header = archive.fileobj.read(tarfile.BLOCKSIZE)
    if not header:
        logger.warning("tar file %s has no mark at its end; it may have lost its last files.", path)
        return
    if len(header) < tarfile.BLOCKSIZE or any(header):
        raise FileError(f"tar file {path} is damaged at byte {archive.offset}; use another copy of it.")
    while rest := archive.fileobj.read(1 << 20):
        if any(rest):
            raise FileError(f"tar file {path} goes on behind its end; if archives were joined, separate them.")


def _members(path: Path, archive: Any, folder: str = "", start: int = 0) -> Iterator[Member]:
    while (member := archive.next()) is not None:
        archive.members = []  # else tarfile keeps the headers of millions of files
        if not member.isreg() or member.issparse():
            continue
        name = f"{folder}{member.name}"
        if name.endswith(".tar") and not folder:
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                yield from _members(path, inner, f"{name.removesuffix('.tar')}/", member.offset_data)
        else:
            yield Member(name, start + member.offset_data, member.size)
    _check_end(path, archive)
