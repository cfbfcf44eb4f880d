"""Files that appear under their name only when they are complete.

A file is written beside its target, flushed to the disk and then renamed, which replaces the target in one step. A
reader of the target finds the old content or the new one, never a part of it, even after a power failure.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qsd.errors import QsdError

_LONGEST_PREFIX = 100  # characters of the target's name in the temporary one, which must stay below the system's limit


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file that replaces ``path`` when the block ends, and only if it ends without an exception.

    The new file has the permission bits that ``open`` would give it.

    Args:
        path: Target; a file that exists there is replaced. Its folder must exist.

    Yields:
        The temporary path to write to, an empty file in the target's folder.

    Raises:
        QsdError: If the folder does not exist, or if the file cannot be written. The target is then unchanged, and the
            temporary file is gone.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise QsdError(f"the folder {path.parent} does not exist; make it first.")
    partial: Path | None = None
    try:
        partial = _new_file(path)
        permissions = partial.stat().st_mode & 0o777
        yield partial
        # Some writers (safetensors is one) set permission bits of their own.
        partial.chmod(permissions)
        _synchronize(partial)
        os.replace(partial, path)
        _synchronize_folder(path.parent)
    except OSError as error:
        raise QsdError(f"{path} cannot be written: {error}.") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


@contextmanager
def replacing_together(folder: str | Path) -> Iterator[Path]:
    """Write several files that appear in ``folder`` when the block ends, and only if it ends without an exception.

    Args:
        folder: Target; it is made if it does not exist. Files of the same names are replaced.

    Yields:
        An empty temporary folder to write the files to.

    Raises:
        QsdError: If the files cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as name:
            yield Path(name)
            files = sorted(Path(name).iterdir())
            # All files are on the disk before the first one gets its name.
            for file in files:
                _synchronize(file)
            for file in files:
                os.replace(file, folder / file.name)
        _synchronize_folder(folder)
    except OSError as error:
        raise QsdError(f"the files cannot be written to {folder}: {error}.") from error


def _new_file(target: Path) -> Path:
    """An empty file of a new name beside the target; the system takes the umask off its permission bits."""
    stem = target.name[:_LONGEST_PREFIX]
    while True:
        partial = target.with_name(f".{stem}.{os.urandom(4).hex()}.part")
        with suppress(FileExistsError):
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return partial


def _synchronize(file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _synchronize_folder(folder: Path) -> None:
    """Write the new name itself to the disk, where the system can do that: Windows and some network disks cannot."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
