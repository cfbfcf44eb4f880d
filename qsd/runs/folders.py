"""Folders that belong to one run each: ``runs/<name>/version_<n>``."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from qsd.errors import QsdError

CHECKPOINTS = "checkpoints"
_PREFIX = "version_"
_folders: "WeakKeyDictionary[Trainer, Path]" = WeakKeyDictionary()


@dataclass
class Claim:
    """New folders that belong to one run.

    Attributes:
        version: The number of the run for ``version_<n>``, or the text that names its folders.
        made: All folders that were made, outer ones first.
    """

    version: int | str
    made: list[Path] = field(default_factory=list)

    def release(self) -> None:
        """Remove the folders in which nothing was written."""
        for folder in reversed(self.made):
            with suppress(OSError):
                folder.rmdir()
        self.made = []


def claim(roots: Iterable[Path], version: int | str | None = None) -> Claim:
    """Make a new folder under each root, with a name that is free in all of them.

    The folders are made when the name is chosen, so that two runs that start at once get one each.

    Args:
        roots: Folders of runs, which are made if they do not exist.
        version: The name that the user wants: a number for ``version_<n>``, or a text. If it is taken, the next free
            number is chosen, or a number is added to the text. ``None`` takes the number after the highest.

    Raises:
        QsdError: If a folder cannot be made.
    """
    unique = list(dict.fromkeys(roots))
    chosen = version if version is not None else _after_highest(unique)
    number = 0
    while True:
        made = _make([root / folder_name(chosen) for root in unique])
        if made is not None:
            return Claim(chosen, made)
        number += 1
        chosen = max(chosen + 1, _after_highest(unique)) if isinstance(chosen, int) else f"{version}-{number}"


def claim_for_loggers(loggers: Iterable[Any]) -> list[Claim]:
    """Give the loggers of a run one new folder, and tell them its number.

    Each logger would take the next free number by itself, and the second would count the folder of the first.

    Args:
        loggers: Loggers of Lightning that have not logged anything.
    """
    with_folders = [logger for logger in loggers if has_log_folder(logger)]
    versions = list(dict.fromkeys(logger._version for logger in with_folders if logger._version is not None))
    claims = []
    for version in versions or ([None] if with_folders else []):
        # Those without a version of their own join the first.
        wanted = (version, None) if version in versions[:1] else (version,)
        members = [logger for logger in with_folders if logger._version in wanted]
        claimed = claim([Path(logger.root_dir) for logger in members], version)
        for logger in members:
            logger._version = claimed.version
        if version is not None and claimed.version != version:
            taken, given = folder_name(version), folder_name(claimed.version)
            print(f"{Path(members[0].root_dir, taken)} belongs to another run; this one takes {given}.")
        claims.append(claimed)
    return claims


def place_checkpoints(trainer: Trainer, folder: Path, resumed: str | None) -> None:
    """Let all checkpoints of a training go into its folder, and refuse a folder of another training.

    Args:
        trainer: The trainer, before its callbacks are set up.
        folder: The folder of the run.
        resumed: The checkpoint from which the training goes on, if it does.

    Raises:
        QsdError: If the user has chosen a folder that holds checkpoints, other than that of the resumed training.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        if callback.dirpath is None:
            callback.dirpath = str(folder / CHECKPOINTS)
            continue
        chosen = Path(callback.dirpath)
        goes_on = resumed is not None and Path(resumed).parent.absolute() == chosen.absolute()
        if not goes_on and any(chosen.glob("*.ckpt")):
            raise QsdError(
                f"dirpath={chosen} holds checkpoints of another training; choose another folder, or go on with one of "
                "them by --ckpt_path."
            )


def folder_name(version: int | str) -> str:
    """The name of a run's folder, as Lightning's loggers give it.

    Args:
        version: Number or text of the run.
    """
    return version if isinstance(version, str) else f"{_PREFIX}{version}"


def has_log_folder(logger: Any) -> bool:
    """Whether a logger writes into a folder that a number or the user names, and not an identifier of its own.

    Args:
        logger: A logger of Lightning.
    """
    return isinstance(logger, CSVLogger | TensorBoardLogger)


def run_folder(trainer: Trainer) -> Path:
    """The folder of a run, for its configuration, checkpoints, report and predictions.

    It is the folder of the first logger that writes one (TensorBoard, CSV). For other loggers (W&B, MLflow) it is
    ``<save_dir>/<name>/<version>``, or a neighbour of it if that belongs to another run. Without loggers it is the
    trainer's ``default_root_dir``. All processes call this function, at first when the run is set up.

    Args:
        trainer: The trainer of the run.
    """
    if trainer not in _folders:
        local: Any = next((logger for logger in trainer.loggers if has_log_folder(logger)), None)
        if local is not None or not trainer.loggers:
            folder = str(local.log_dir if local is not None else trainer.default_root_dir)
        else:
            folder = str(_of_other_logger(trainer)) if trainer.is_global_zero else ""
        _folders[trainer] = Path(trainer.strategy.broadcast(folder))
    return _folders[trainer]


def _of_other_logger(trainer: Trainer) -> Path:
    logger = trainer.loggers[0]
    folder = Path(logger.save_dir or trainer.default_root_dir, str(logger.name), folder_name(logger.version or 0))
    number = 0
    while True:
        # The logger itself may have made the folder; that of its checkpoints is made here alone.
        candidate = folder if not number else folder.with_name(f"{folder.name}-{number}")
        if _make([candidate / CHECKPOINTS]) is not None:
            return candidate
        number += 1


def _make(folders: list[Path]) -> list[Path] | None:
    """Make new folders, with those above them, and return all that were made; ``None`` if one of them exists."""
    claimed = Claim(0)
    try:
        for folder in folders:
            missing = [above for above in folder.parents if not above.exists()]
            folder.parent.mkdir(parents=True, exist_ok=True)
            claimed.made += reversed(missing)
            os.mkdir(folder)
            claimed.made.append(folder)
    except FileExistsError as error:
        claimed.release()
        if not Path(error.filename).is_dir():
            raise _unwritable(error) from error
        return None
    except OSError as error:
        claimed.release()
        raise _unwritable(error) from error
    return claimed.made


def _unwritable(error: OSError) -> QsdError:
    return QsdError(
        f"no folder for this run can be made: {error}; choose another place with the logger's save_dir or "
        "--trainer.default_root_dir."
    )


def _after_highest(roots: list[Path]) -> int:
    names = [path.name.removeprefix(_PREFIX) for root in roots for path in root.glob(f"{_PREFIX}*")]
    return max((int(name) for name in names if name.isdecimal()), default=-1) + 1
