"""The checkpoint from which an interrupted training of mmengine goes on."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsd.errors import QsdError
from qsd.mm.checkpoints import read_mm_checkpoint
from qsd.reading import FileError, parse_assignments, part_of, regular_file

logger = logging.getLogger(__name__)

POINTER = "last_checkpoint"  # the file in which mmengine writes the path of the newest checkpoint
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
    named = _named(folder / POINTER)
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


def check_same_training(content: Mapping[str, Any], config: Mapping[str, Any], path: str | Path) -> None:
    """Refuse to go on with another optimizer or schedule: mmengine would keep that of the checkpoint without a word.

    Args:
        content: Contents of the checkpoint.
        config: The configuration of the training that goes on.
        path: The checkpoint, for the message.

    Raises:
        QsdError: Naming the first part that differs.
    """
    try:
        saved = parse_assignments(part_of(content, "meta.cfg", str, path, ""), str(path))
    except QsdError:
        return  # The configuration is of another kind; it is not needed.
    for name in ("optim_wrapper", "param_scheduler"):
        difference = _difference(saved.get(name), config.get(name), name) if name in saved else None
        if difference is not None:
            raise QsdError(
                f"{path} was written with {difference}; go on with the settings of the checkpoint, or start a new "
                "training from its weights with load_from."
            )


def _difference(saved: Any, current: Any, where: str) -> str | None:
    """The first place in which two parts of configurations differ, in words."""
    if isinstance(saved, dict) and isinstance(current, dict):
        pairs = [(saved.get(key), current.get(key), f"{where}.{key}") for key in (*saved, *current)]
    elif isinstance(saved, list | tuple) and isinstance(current, list | tuple) and len(saved) == len(current):
        pairs = [(a, b, f"{where}.{i}") for i, (a, b) in enumerate(zip(saved, current))]
    else:
        return None if saved == current else f"{where}={saved!r}, and not {current!r}"
    return next((found for pair in pairs if (found := _difference(*pair)) is not None), None)


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
