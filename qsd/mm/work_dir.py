"""The folder of a training, which belongs to it alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qsd.errors import QsdError
from qsd.mm.resuming import POINTER

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCK = ".training"  # The system releases the lock on this file when the process ends, however it ends.


@contextmanager
def only_training_in(folder: str | Path, goes_on: bool) -> Iterator[None]:
    """Refuse a folder in which another training runs or has left its checkpoints.

    Args:
        folder: The folder of the training; it is made if it does not exist.
        goes_on: Whether the training continues the one that left its checkpoints.

    Raises:
        QsdError: If the folder cannot be written or belongs to another training.
    """
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":  # The first process decides.
        yield
        return
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise QsdError(f"the folder of this training cannot be written: {error}; give another --work-dir.") from error
    try:
        _lock(descriptor, folder)
        if not goes_on and ((folder / POINTER).exists() or any(folder.glob("*.pth"))):
            raise QsdError(
                f"{folder} holds the checkpoints of another training; go on with it by --resume, or give another "
                "--work-dir."
            )
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise QsdError(f"another training is running in {folder}; give another --work-dir.") from error
    except OSError:  # a network disk without locks
        return
