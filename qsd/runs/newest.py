"""The checkpoint from which ``--ckpt_path last`` goes on."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qsd.errors import QsdError
from qsd.models.checkpoints import read_checkpoint

logger = logging.getLogger(__name__)

_PARTS = {"state_dict", "pytorch-lightning_version"}  # of every checkpoint of Lightning


def find_checkpoint(kind: str, trainer: Any) -> Path:
    """The checkpoint that ``--ckpt_path last`` or ``hpc`` means for a configuration.

    Args:
        kind: ``"last"``: the newest one of the runs whose logger has this name. ``"hpc"``: the newest one that
            Lightning has written when SLURM stopped a job.
        trainer: The trainer's part of the configuration.

    Raises:
        QsdError: If there is none.
    """
    root = Path(trainer.get("default_root_dir") or ".")
    if kind == "last":
        return newest_checkpoint([*_folders_of_runs(trainer, root), *_chosen_folders(trainer)])
    numbered = [path for path in root.glob("hpc_ckpt_*.ckpt") if path.stem.removeprefix("hpc_ckpt_").isdecimal()]
    if not numbered:
        raise QsdError(f"ckpt_path='hpc' finds no checkpoint of a job of SLURM in {root}.")
    return max(numbered, key=lambda path: int(path.stem.removeprefix("hpc_ckpt_")))


def _folders_of_runs(trainer: Any, root: Path) -> Iterator[Path]:
    loggers = trainer.get("logger")
    if loggers is False:
        yield root
    elif loggers is None or loggers is True:
        yield root / "lightning_logs"
    for logger in loggers if isinstance(loggers, list) else [loggers] if hasattr(loggers, "class_path") else []:
        options = logger.get("init_args") or {}
        saved = Path(options.get("save_dir") or root)
        if logger.class_path.endswith(("CSVLogger", "TensorBoardLogger")):
            yield saved / (options.get("name") or "")
        elif options.get("project"):
            yield saved / options["project"]
        elif saved.is_dir():  # such as MLflow's, which names folders by identifiers
            yield from (folder for folder in sorted(saved.iterdir()) if folder.is_dir())


def _chosen_folders(trainer: Any) -> Iterator[Path]:
    callbacks = trainer.get("callbacks")
    for callback in callbacks if isinstance(callbacks, list) else []:
        if (callback.get("init_args") or {}).get("dirpath"):
            yield Path(callback.init_args.dirpath)


def newest_checkpoint(folders: Iterable[Path]) -> Path:
    """The newest undamaged checkpoint of all runs of a name.

    Args:
        folders: Folders of runs, in which checkpoints are at ``*.ckpt``, ``checkpoints/*.ckpt`` or
            ``<run>/checkpoints/*.ckpt``.

    Raises:
        QsdError: If there is none.
    """
    searched = list(dict.fromkeys(folders))
    patterns = ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt")
    found = {path for folder in searched for pattern in patterns for path in folder.glob(pattern)}
    found = {path for path in found if path.is_file() and not path.name.startswith(".")}
    faults: list[QsdError] = []
    for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, str(path)), reverse=True):
        try:
            read_run_checkpoint(path)
        except QsdError as fault:
            faults.append(fault)
            continue
        if faults:
            logger.warning("%s The one before it, %s, is taken.", faults[0], path)
        return path
    places = ", ".join(map(str, searched))
    if faults:
        raise QsdError(f"none of the {len(faults)} checkpoint(s) in {places} can be read; the newest: {faults[0]}")
    raise QsdError(
        f"ckpt_path='last' finds no checkpoint in {places}; leave it out to start a training, or give the path of one."
    )


def read_run_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a training's checkpoint.

    Args:
        path: Path of a file that Lightning wrote.

    Raises:
        QsdError: If it cannot be read, or is something else.
    """
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= _PARTS:
        raise QsdError(f"{path} is no checkpoint of a training; to start from its weights use --model.init_from.")
    return checkpoint
