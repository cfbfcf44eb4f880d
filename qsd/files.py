"""Files that appear under their name only when they are complete.

A file is written beside its target, flushed to the disk and then renamed, which replaces the target in one step. A
reader of the target finds the old content or the new one, never a part of it, even after a power failure.
"""

import errno
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qsd.errors import QsdError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_UNFINISHED = ".unfinished-"
_ABANDONED = 3600  # seconds after which a file that nobody has locked is taken for one of a process that was killed
_LONGEST_PREFIX = 100  # characters of the target's name in the temporary one, which must stay below the system's limit
# Libraries that write files themselves (safetensors, h5py, PyTorch) tell faults of the disk by these words.
_DISK_FAULTS = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)))
_DISK_FAULTS += ("failed writing file", "fail at inline_container")


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
        _remove_abandoned_parts(path)
        partial = _new_file(path)
        permissions = partial.stat().st_mode & 0o777
        with _locked(partial):
            yield partial
        # Some writers (safetensors is one) set permission bits of their own.
        partial.chmod(permissions)
        _synchronize(partial)
        os.replace(partial, path)
        _synchronize_folder(path.parent)
    except Exception as error:
        if not is_disk_fault(error):
            raise
        raise QsdError(f"{path} cannot be written: {error}.") from error
    finally:
        if partial is not None:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def replace_content(path: str | Path, content: bytes | memoryview) -> None:
    """Replace the content of a file in one step, without a trace if the process is killed before that.

    Linux writes to a file without a name, which disappears with its process. Other systems write as `replacing` does.

    Args:
        path: Target; a file that exists there is replaced. Its folder must exist.
        content: The new content.

    Raises:
        QsdError: If the file cannot be written; the target is then unchanged.
    """
    path = Path(path)
    _remove_abandoned_parts(path)
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
    except (AttributeError, OSError):  # another system, or a disk that has only files with names
        with replacing(path) as partial:
            partial.write_bytes(content)
        return
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
            _give_name(descriptor, path)
        _synchronize_folder(path.parent)
    except OSError as error:
        raise QsdError(f"{path} cannot be written: {error}.") from error


def cache_folder() -> Path:
    """The folder for what can be made or fetched again: ``QSD_CACHE``, or ``qsd`` in the user's folder of caches."""
    if chosen := os.environ.get("QSD_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsd"


def is_disk_fault(error: BaseException) -> bool:
    """Whether an exception says that a file cannot be written, such as for want of space.

    Args:
        error: The exception of a writer.
    """
    return isinstance(error, OSError) or any(words in str(error) for words in _DISK_FAULTS)


@contextmanager
def replacing_together(folder: str | Path) -> Iterator[Path]:
    """Write several files that appear in ``folder`` when the block ends, and only if it ends without an exception.

    The temporary folder of a process that was killed in such a block is removed by the next one.

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
        _remove_abandoned(folder, f"{_UNFINISHED}*")
        with _unfinished_folder(folder) as unfinished:
            yield unfinished
            files = sorted(unfinished.iterdir())
            # All files are on the disk before the first one gets its name.
            for file in files:
                _synchronize(file)
            for file in files:
                os.replace(file, folder / file.name)
        _synchronize_folder(folder)
    except Exception as error:
        if not is_disk_fault(error):
            raise
        raise QsdError(f"the files cannot be written to {folder}: {error}.") from error


def _hidden_name(target: Path) -> str:
    return f".{target.name[:_LONGEST_PREFIX]}"


def _unused_name(target: Path) -> Path:
    return target.with_name(f"{_hidden_name(target)}.{os.urandom(4).hex()}.part")


@contextmanager
def _unfinished_folder(folder: Path) -> Iterator[Path]:
    """A new temporary folder, which is locked as long as it is in use."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
        with _locked(path):
            if not path.exists():  # Another process has removed it before it was locked.
                continue
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
            return


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Lock a file or folder, if nobody else has. The system releases the lock however the process ends.

    Yields:
        Whether it is locked by this block; always false where there are no locks (Windows, some network disks).
    """
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = fcntl is not None
    except OSError:
        locked = False
    try:
        yield locked
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _remove_abandoned_parts(target: Path) -> None:
    _remove_abandoned(target.parent, f"{glob.escape(_hidden_name(target))}.*.part", _ABANDONED)


def _remove_abandoned(folder: Path, pattern: str, age: float = 0.0) -> None:
    """Remove what processes have left that were killed while they wrote.

    Args:
        folder: The folder of the finished files.
        pattern: Glob of the unfinished ones.
        age: Least time since the last change, in seconds; some writers replace the file that was locked.
    """
    for path in folder.glob(pattern):
        with suppress(OSError), _locked(path) as nobody_else:
            if not nobody_else or time.time() - path.stat().st_mtime < age:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _give_name(descriptor: int, target: Path) -> None:
    """Replace a target by an open file without a name. A link cannot replace a file, so it gets another name first."""
    partial = _unused_name(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        # Python follows the symbolic link of /proc to the file itself only if a folder is given, which is not used.
        os.link(f"/proc/self/fd/{descriptor}", partial, src_dir_fd=folder, follow_symlinks=True)
        os.replace(partial, target)
    finally:
        os.close(folder)
        partial.unlink(missing_ok=True)


def _new_file(target: Path) -> Path:
    """An empty file of a new name beside the target; the system takes the umask off its permission bits."""
    while True:
        partial = _unused_name(target)
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
