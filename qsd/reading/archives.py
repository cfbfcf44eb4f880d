"""The check sums of zip archives, which ``torch.load`` does not look at."""

import zipfile
import zlib
from pathlib import Path

from qsd.reading.files import FileError

_CHUNK = 1 << 20  # bytes


def check_archive(path: Path) -> None:
    """Compare the contents of a zip archive with its check sums, one megabyte at a time.

    ``torch.load`` reads a block of zeros, as a failing disk leaves behind, as weights. Archives that were written
    without check sums (``torch.serialization.set_crc32_options(False)`` stores zeros) are not refused.

    Args:
        path: Path of a zip archive.

    Raises:
        FileError: If the archive is damaged, or holds compressed or overlapping members, which ``torch.save`` never
            writes and which could need any amount of memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise FileError(f"{path} has compressed members, which PyTorch never writes; it was packed by others.")
            if sum(member.file_size for member in members) > path.stat().st_size:
                raise FileError(f"{path} has members that overlap; it was not written by PyTorch.")
            if all(member.CRC == 0 for member in members if member.file_size):
                return
            for member in members:
                _check_member(archive, member, path)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} is a damaged or incomplete archive ({error}); use another copy of it.") from error


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    try:
        with archive.open(member) as stream:  # which compares the sum at its end
            while stream.read(_CHUNK):
                pass
    except zipfile.BadZipFile as error:
        raise FileError(
            f"{path} is damaged: the check sum of its part {member.filename} is wrong; use another copy of the file."
        ) from error
