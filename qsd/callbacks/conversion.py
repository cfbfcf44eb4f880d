"""Conversion to binary spikes at the end of a training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from qsd import report
from qsd.errors import QsdError
from qsd.neurons import SpikeNeuron
from qsd.packing import image_notes
from qsd.report.processes import from_first_process


class ConvertToSpikeDriven(Callback):
    """After training, turn the best weights into a network of binary spikes, and report what that gives and costs.

    It takes the checkpoint of the first `ModelCheckpoint` that monitors something (with weight averaging, the averaged
    weights in it), converts it, verifies it on the validation images, and writes ``spiking.safetensors`` (packed),
    ``conversion.json`` and ``report.html`` into the run's folder. The main figures go to every logger, as
    ``spiking/...``. Only the first process works, the others wait for it. Nothing of the training is touched: a
    conversion that fails is reported and leaves no files.

    A float twin has no spikes and is left as it is, with a warning. A network without a best checkpoint is saved as
    ``final.ckpt`` first.

    Args:
        merge: turn chains of convolutions into one each; True, False, ``"rep"`` or ``"sep"``.
        merged_bits: quantize the merged kernels to so many bits; not lossless.
        delay: steps by which neurons wait; ``None`` for the lossless T - 1.
        preset: prices of operations: ``"fp32"`` (the papers'), ``"fp16"`` or ``"int8"``.
        max_images: measure on so many validation images; ``None`` for all that validation sees.
        step_images: images that are also stepped through time.
        float_accuracy: accuracy of the float twin, a share, for the report.
        raster: neuron whose spikes are drawn; ``None`` for the query of the last attention.
        stages: what to measure: ``"compare"``, ``"delays"``, ``"activity"``, ``"audit"``, ``"energy"``.

    Raises:
        QsdError: for options that cannot be.
    """

    def __init__(
        self,
        merge: bool | Literal["rep", "sep"] = True,
        merged_bits: int | None = None,
        delay: int | None = None,
        preset: str = "fp32",
        max_images: int | None = None,
        step_images: int = 100,
        float_accuracy: float | None = None,
        raster: str | None = None,
        stages: Sequence[str] = report.STAGES,
    ) -> None:
        report.check_options(merge, merged_bits, delay, preset, max_images, step_images, float_accuracy, stages)
        self.max_images = max_images
        self.options: dict[str, Any] = {
            "merge": merge,
            "merged_bits": merged_bits,
            "delay": delay,
            "preset": preset,
            "step_images": step_images,
            "float_accuracy": float_accuracy,
            "raster": raster,
            "stages": tuple(stages),
        }
        self._enabled = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say before the training what could not be done behind it."""
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
        raster = self.options["raster"]
        if raster is not None and f"model.{raster}" not in neurons:
            known = ", ".join(sorted(name.removeprefix("model.") for name in neurons)[:3])
            raise QsdError(f"raster={raster!r} names no neuron; names are {known}, ...")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert, with everything of the training already written."""
        if not self._enabled:
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        checkpoint = _best_checkpoint(trainer, folder)
        problem, cause = None, None
        if trainer.is_global_zero:
            bar = getattr(trainer.progress_bar_callback, "progress", None)
            if bar is not None:  # rich's, which would redraw itself among ours
                bar.stop()
            try:
                self._convert(trainer, pl_module, checkpoint, folder)
            except Exception as error:  # whatever it was, the training is not lost and the others are waiting
                reason = str(error) if isinstance(error, QsdError) else f"{type(error).__name__}: {error}"
                problem, cause = (
                    f"the trained network is safe in {checkpoint}, but its conversion failed: {reason}",
                    error,
                )
        problem = from_first_process(problem)
        if problem is not None:
            raise QsdError(problem) from cause

    def _convert(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Path, folder: Path) -> None:
        task: Any = type(pl_module).load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
        if not hasattr(task, "model"):
            raise QsdError(f"{type(task).__name__} has no network under the name `model`.")
        root = trainer.strategy.root_device
        device = root if root.type == "cuda" else torch.device("cpu")  # conversion needs float64, which others lack
        data: Any = getattr(trainer, "datamodule", None)
        record = report.write_conversion(
            task.model.to(device),
            _validation_images(trainer),
            folder,
            notes=image_notes(data),
            name=str(task.hparams.get("model", type(task.model).__name__)),
            checkpoint=str(checkpoint),
            source=f"validation images{f' of {type(data).__name__}' if data is not None else ''}",
            max_images=self._image_limit(trainer),
            progress=trainer.progress_bar_callback is not None,
            **self.options,
        )
        for logger in trainer.loggers:
            logger.log_metrics(report.metrics(record), step=trainer.global_step)
            logger.save()
        Console().print(report.summary(record))
        print(f"report: {folder / 'report.html'}")

    def _image_limit(self, trainer: Trainer) -> int | None:
        """No more images than the validation of the training saw."""
        batch_size = getattr(_validation_images(trainer), "batch_size", None)
        if trainer.limit_val_batches == 1.0 or batch_size is None:
            return self.max_images
        seen = int(trainer.num_val_batches[0]) * batch_size * trainer.world_size
        return seen if self.max_images is None else min(seen, self.max_images)


def _best_checkpoint(trainer: Trainer, folder: Path) -> Path:
    """The best checkpoint by what is monitored, else the newest, else one that is written now (by all processes)."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.best_model_path]
    paths = [Path(c.best_model_path) for c in sorted(callbacks, key=lambda c: c.monitor is None)]
    # The first process decides: others may not see its disk.
    path = trainer.strategy.broadcast(next((path for path in paths if path.is_file()), None))
    if path is None:
        path = folder / "final.ckpt"
        trainer.save_checkpoint(path)
    return path


def _validation_images(trainer: Trainer) -> Any:
    """The whole validation part in this process; of another data module than ours, this process's share."""
    data: Any = getattr(trainer, "datamodule", None)
    if hasattr(data, "whole_part"):
        return data.whole_part("val")
    loader = trainer.val_dataloaders
    return loader[0] if isinstance(loader, list) else loader
