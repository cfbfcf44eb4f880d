"""The checkpoint from which an interrupted training of mmengine goes on."""

import logging
from pathlib import Path
from typing import Any

from qsd.errors import QsdError
from qsd.mm.checkpoints import read_mm_checkpoint
from qsd.reading import FileError, part_of, regular_file

logger = logging.getLogger(__name__)

_POINTER = "last_checkpoint"  # the file in which mmengine writes the path of the newest checkpoint
_LONGEST = 4096  # bytes of a path


def checkpoint_to_resume(work_dir: str | Path) -> str | None:
    """The newest undamaged checkpoint of a run's folder.

    Args:
        work_dir: Folder of the run.

    Returns:
        Its path, or ``None`` if the folder holds no checkpoint.

    Raises:
        QsdError: If all of its checkpoints are damaged; with the newest one's fault.
    """
    folder = Path(work_dir)
    named = _named(folder / _POINTER)
    others = (
        sorted(folder.glob("*.pth"), key=lambda path: path.stat().st_mtime, reverse=True) if folder.is_dir() else []
    )
    candidates = list(dict.fromkeys([*([named] if named else []), *(path for path in others if path.is_file())]))
    faults: list[QsdError] = []
    for path in candidates:
        try:
            check_resumable(path)
        except QsdError as fault:
            faults.append(fault)
            continue
        if faults:
            logger.warning("%s Resuming from the one before it, %s.", faults[0], path)
        return str(path)
    if faults:
        raise QsdError(
            f"none of the {len(faults)} checkpoint(s) in {folder} can be resumed from; the newest: {faults[0]}"
        )
    return None


def check_resumable(path: str | Path) -> dict[str, Any]:
    """Refuse a checkpoint that does not hold the state of a training.

    Args:
        path: Path of a checkpoint.

    Returns:
        Its contents.

    Raises:
        QsdError: If it is missing, damaged, wants to run code, or lacks a part.
    """
    content = read_mm_checkpoint(path)
    for name, kind in (("state_dict", dict), ("message_hub", dict), ("meta.epoch", int), ("meta.iter", int)):
        part_of(content, name, kind, path)
    part_of(content, "optimizer", dict, path, {})
    return content


def _named(pointer: Path) -> Path | None:
    """The checkpoint that mmengine noted last, if the note is there and readable."""
    if not pointer.exists():
        return None
    try:
        text = regular_file(pointer).read_bytes()[:_LONGEST].decode().strip()
    except (FileError, OSError, UnicodeDecodeError):
        logger.warning("%s cannot be read; the newest checkpoint in its folder is taken.", pointer)
        return None
    found = Path(text)
    # A folder that was moved takes its checkpoints along.
    return found if found.exists() or not (pointer.parent / found.name).exists() else pointer.parent / found.name
