"""The folder of a training, which belongs to it alone."""

import itertools
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


def own_folder(default: str | Path, resume: str | None) -> str:
    """The folder of a training for which the user has chosen none.

    Args:
        default: The folder of the first training of a configuration; further ones get ``<default>-1`` and so on.
        resume: The checkpoint from which the training goes on, ``"auto"`` for the newest one, ``None`` for none.

    Returns:
        A new folder, or the one of the training that goes on.
    """
    default = Path(default)
    family = (default if not number else default.with_name(f"{default.name}-{number}") for number in itertools.count())
    used = list(itertools.takewhile(_holds_training, family))
    if resume is None:
        chosen = default.with_name(f"{default.name}-{len(used)}") if used else default
        if used and _is_first_process():
            print(f"{default} belongs to another training; this one takes {chosen}.")
    elif resume == "auto":
        chosen = max(used, key=lambda folder: folder.stat().st_mtime, default=default)
    else:
        chosen = next((folder for folder in used if folder.absolute() == Path(resume).parent.absolute()), default)
    return str(chosen)


def _holds_training(folder: Path) -> bool:
    return (folder / POINTER).exists() or any(folder.glob("*.pth"))


def _is_first_process() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


@contextmanager
def only_training_in(folder: str | Path, goes_on: bool) -> Iterator[None]:
    """Refuse a folder in which another training runs or has left its checkpoints.

    Args:
        folder: The folder of the training; it is made if it does not exist.
        goes_on: Whether the training continues the one that left its checkpoints.

    Raises:
        QsdError: If the folder cannot be written or belongs to another training.
    """
    if not _is_first_process():
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
        if not goes_on and _holds_training(folder):
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
