"""Conversion to binary spikes at the end of a training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from qsd import report
from qsd.errors import QsdError
from qsd.neurons import SpikeNeuron
from qsd.packing import image_notes
from qsd.runs import run_folder


class ConvertToSpikeDriven(Callback):
    """After training, convert the best weights to a network of binary spikes, and report its accuracy and cost.

    The checkpoint is that of the first `ModelCheckpoint` that monitors a quantity (with weight averaging, its averaged
    weights). The converted network is verified on the validation images, and ``spiking.safetensors`` (packed),
    ``conversion.json`` and ``report.html`` are written into the run's folder. The main figures go to every logger, as
    ``spiking/...``. Only the first process works, the others wait. The training's own files are not touched: a
    conversion that fails is reported and leaves no files.

    A float twin has no spikes and is not converted, with a warning. Without a best checkpoint the final weights are
    saved as ``final.ckpt`` first.

    Args:
        **options: Fields of `qsd.report.ConversionOptions`.

    Raises:
        QsdError: For options that are wrong.
    """

    def __init__(self, **options: Any) -> None:
        self.options = report.ConversionOptions(**options)
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the folder of the training belong to it from its start."""
        if stage == "fit":
            run_folder(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before the training what could not be done after it."""
        neurons = {name for name, m in pl_module.named_modules() if isinstance(m, SpikeNeuron)}
        self._enabled = bool(neurons) and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if not neurons:
            rank_zero_warn("the network has no spiking neurons (a float twin?): it will not be converted.")
            return
        if self._enabled and not trainer.enable_validation:
            raise QsdError(
                "ConvertToSpikeDriven verifies on validation images, and there are none; give some or remove it from "
                "the callbacks."
            )
        raster = self.options.raster
        if raster is not None and f"model.{raster}" not in neurons:
            known = ", ".join(sorted(name.removeprefix("model.") for name in neurons)[:3])
            raise QsdError(f"raster={raster!r} names no neuron; names are {known}, ...")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert, when all files of the training are complete."""
        if not self._enabled:
            return
        folder = run_folder(trainer)
        checkpoint = _best_checkpoint(trainer, folder)
        bar = getattr(trainer.progress_bar_callback, "progress", None)
        if bar is not None:  # Rich's bar would be drawn again among ours.
            bar.stop()
        record = report.convert_after_training(
            lambda: self._write(trainer, type(pl_module), checkpoint, folder), trainer.is_global_zero, checkpoint
        )
        if record is not None:
            for logger in trainer.loggers:
                logger.log_metrics(report.metrics(record), step=trainer.global_step)
                logger.save()
            Console().print(report.summary(record))
            print(f"report: {folder / report.PAGE}")

    def _write(self, trainer: Trainer, kind: type[LightningModule], checkpoint: Path, folder: Path) -> report.Record:
        task: Any = kind.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
        if not hasattr(task, "model"):
            raise QsdError(f"{kind.__name__} has no network under the name `model`.")
        root = trainer.strategy.root_device
        device = root if root.type == "cuda" else torch.device("cpu")  # Other devices lack float64.
        data: Any = getattr(trainer, "datamodule", None)
        origin = report.Origin(
            name=str(task.hparams.get("model", type(task.model).__name__)),
            checkpoint=str(checkpoint),
            source=f"validation images{f' of {type(data).__name__}' if data is not None else ''}",
        )
        return report.write_conversion(
            task.model.to(device),
            _validation_images(trainer),
            folder,
            _limited(self.options, trainer),
            origin,
            image_notes(data),
            progress=trainer.progress_bar_callback is not None,
        )


def _limited(options: report.ConversionOptions, trainer: Trainer) -> report.ConversionOptions:
    """The options with no more images than the validation of the training used."""
    batch_size = getattr(_validation_images(trainer), "batch_size", None)
    if trainer.limit_val_batches == 1.0 or batch_size is None:
        return options
    seen = int(trainer.num_val_batches[0]) * batch_size * trainer.world_size
    return replace(options, max_images=seen if options.max_images is None else min(seen, options.max_images))


def _best_checkpoint(trainer: Trainer, folder: Path) -> Path:
    """The best checkpoint by the monitored quantity, else the newest, else one that all processes write now."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.best_model_path]
    paths = [Path(c.best_model_path) for c in sorted(callbacks, key=lambda c: c.monitor is None)]
    # The first process decides, because the others may not see its disk.
    path = trainer.strategy.broadcast(next((path for path in paths if path.is_file()), None))
    if path is None:
        path = folder / "final.ckpt"
        trainer.save_checkpoint(path)
    return path


def _validation_images(trainer: Trainer) -> Any:
    """The whole validation part in this process; for other data modules than ours, this process's share."""
    data: Any = getattr(trainer, "datamodule", None)
    if hasattr(data, "whole_part"):
        return data.whole_part("val")
    loader = trainer.val_dataloaders
    return loader[0] if isinstance(loader, list) else loader
