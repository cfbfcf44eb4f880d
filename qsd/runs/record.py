"""The facts of a run that its measurements do not tell: network, seed, hours, hardware, versions."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from pydantic import Field

from qsd._version import __version__
from qsd.errors import QsdError
from qsd.files import replace_content
from qsd.layers.steps import step_names
from qsd.runs.folders import run_folder
from qsd.schema import Schema, Size, check_version, parse, read_object

FILE = "run.json"
VERSION = 1
_PACKAGES = ("torch", "torchvision", "timm", "lightning", "numpy")
_Positive = Annotated[float, Field(ge=0)]


class RunRecord(Schema):
    """The content of ``run.json``.

    Attributes:
        version: Version of this form.
        stage: The subcommand.
        model: Name of the network.
        model_args: Its arguments.
        parameters: Number of parameters, step sizes not counted.
        data: Name of the data module, and of the data set where it has one.
        images: Number of images by part, of the parts that were read.
        batch_size: Images of an optimizer step, over all processes and accumulated batches.
        seed: Seed of the run, if there is one.
        epochs: Finished epochs, over all stretches of the training.
        seconds: Seconds that the run took, over all stretches of the training.
        checkpoint: Checkpoint that was evaluated or resumed, seen from the folder of the run.
        best: The best checkpoint of a training, seen from there too.
        metrics: The last measurements by name.
        hardware: Processor, GPU and number of processes, in words.
        versions: Versions by package.
    """

    version: Literal[1] = 1
    stage: Literal["fit", "validate", "test"]
    model: str
    model_args: dict[str, Any]
    parameters: Size
    data: str
    images: dict[str, Size]
    batch_size: Size
    seed: Size | None
    epochs: Size
    seconds: _Positive
    checkpoint: str | None
    best: str | None
    metrics: dict[str, float]
    hardware: str
    versions: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> "RunRecord":
        """Read a ``run.json``.

        Args:
            path: The file.

        Raises:
            QsdError: If it cannot be read, is of a newer version, or has a field that does not fit.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise QsdError(f"{path} cannot be read: {error.strerror or error}.") from error
        remedy = "it is written by qsd fit and qsd test"
        content = read_object(text, str(path), remedy)
        check_version(content, VERSION, str(path))
        return parse(cls, content, str(path), remedy)


class WriteRunRecord(Callback):
    """Writes ``run.json`` into the folder of a run when it is complete.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._start = time.monotonic()
        self._before = 0.0  # seconds of earlier stretches of this training

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far, for the checkpoint."""
        return {"seconds": self._before + time.monotonic() - self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting.

        Args:
            state_dict: From `state_dict`.
        """
        self._before = float(state_dict["seconds"])
        self._start = time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count, unless a checkpoint has told the seconds of earlier stretches."""
        self._start = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record of a training."""
        self._write(trainer, pl_module, "fit", self.state_dict()["seconds"])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record of a test."""
        self._write(trainer, pl_module, "test", time.monotonic() - self._start)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record of a validation that is no part of a training."""
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module, "validate", time.monotonic() - self._start)

    def _write(self, trainer: Trainer, task: Any, stage: Any, seconds: float) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # All processes together: metrics are summed over them, and the folder is that of the first one.
        folder, metrics = run_folder(trainer), trainer.callback_metrics
        if not trainer.is_global_zero:
            return
        hyper_parameters = dict(getattr(task, "hparams", {}))
        network = getattr(task, "model", None)
        if not isinstance(network, torch.nn.Module) or "model" not in hyper_parameters:
            return  # a task of the user's own
        steps = step_names(network)
        best = next((path for c in trainer.checkpoint_callbacks if (path := _best_path(c))), None)
        folder.mkdir(parents=True, exist_ok=True)
        record = RunRecord(
            stage=stage,
            model=str(hyper_parameters["model"]),
            model_args=_plain(hyper_parameters.get("model_args") or {}),
            parameters=sum(p.numel() for name, p in network.named_parameters() if name not in steps),
            data=_data_name(trainer),
            images=_images(trainer),
            batch_size=getattr(task, "total_batch_size", 0) if stage == "fit" else 0,
            seed=self._seed,
            epochs=trainer.current_epoch if stage == "fit" else 0,
            seconds=seconds,
            checkpoint=_seen_from(folder, trainer.ckpt_path),
            best=_seen_from(folder, best),
            metrics={name: float(value) for name, value in metrics.items()},
            hardware=hardware(trainer.world_size),
            versions=versions(),
        )
        replace_content(folder / FILE, (record.model_dump_json(indent=1) + "\n").encode())


def hardware(processes: int = 1) -> str:
    """The processor or the GPUs of this machine in words.

    Args:
        processes: Number of processes that compute.
    """
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        return device if processes == 1 else f"{processes} x {device}"
    threads = torch.get_num_threads() * processes
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the packages that compute."""
    found = {"qsd": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _seen_from(folder: Path, path: Any) -> str | None:
    return os.path.relpath(path, folder) if path else None


def _best_path(callback: Any) -> str | None:
    monitors = isinstance(callback, ModelCheckpoint) and callback.monitor is not None
    return callback.best_model_path if monitors else None


def _data_name(trainer: Trainer) -> str:
    data = getattr(trainer, "datamodule", None)
    name = getattr(data, "name", None)
    return type(data).__name__ if name is None else f"{type(data).__name__} {name}"


def _images(trainer: Trainer) -> dict[str, int]:
    sources = getattr(getattr(trainer, "datamodule", None), "_sources", {})
    return {part: len(source) for part, source in sources.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
