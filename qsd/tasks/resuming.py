"""What a resumed training keeps beside its weights: the best checkpoint, gradients, and settings that must agree."""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint, WeightAveraging

from qsd.errors import QsdError
from qsd.runs import write_whole_files

logger = logging.getLogger(__name__)

_GRADIENTS, _RUN = "accumulated_gradients", "run"  # of checkpoints


class Resuming(Callback):
    """Restore what Lightning leaves out, and refuse what would change the training without a word."""

    def __init__(self) -> None:
        self._gradients: dict[str, torch.Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let no checkpoint be destroyed while the next one is written; let a found rate be the rate of this batch."""
        write_whole_files(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LearningRateFinder) and callback._attr_name == "base_lr":
                callback._attr_name = "learning_rate"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the gradients of the batches since the last optimizer step, averaged over all processes."""
        checkpoint[_RUN] = {"accumulated_batches": trainer.accumulate_grad_batches}
        if not trainer.fit_loop._should_accumulate():
            return
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        if trainer.world_size > 1:
            reduced = {name: trainer.strategy.reduce(g.clone(), reduce_op="mean") for name, g in gradients.items()}
            gradients = {name: g for name, g in reduced.items() if isinstance(g, torch.Tensor)}
        checkpoint[_GRADIENTS] = gradients

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the settings, and keep the best checkpoint of the training, which is in another run's folder."""
        if trainer.state.fn != "fit":
            return
        averaging = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if "current_model_state" in checkpoint and not averaging:
            raise QsdError(
                "the checkpoint is of a training with averaged weights, and this one has no averaging; add the "
                "callback EMAWeightAveraging, or start a new training from the averages with --model.init_from."
            )
        before = checkpoint.get(_RUN, {}).get("accumulated_batches", trainer.accumulate_grad_batches)
        if before != trainer.accumulate_grad_batches and _within_epoch(checkpoint):
            raise QsdError(
                f"the checkpoint is from within an epoch with accumulate_grad_batches={before}; go on with this number "
                f"instead of {trainer.accumulate_grad_batches}, or from a checkpoint of the end of an epoch."
            )
        self._gradients = checkpoint.get(_GRADIENTS, {})
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state:
                _keep_best(trainer, callback, state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the optimizer again if Lightning has found another rate or batch size for a new training."""
        task: Any = pl_module
        built = getattr(task, "optimizer_rate", None)
        if built is not None and trainer.global_step == 0 and built != task.learning_rate:
            trainer.strategy.setup_optimizers(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the gradients, on which the first batch adds up."""
        gradients, self._gradients = self._gradients, {}
        for name, gradient in gradients.items():
            parameter = pl_module.get_parameter(name)
            parameter.grad = gradient.to(parameter.device, parameter.dtype, copy=True)


def _within_epoch(checkpoint: dict[str, Any]) -> bool:
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return bool(progress) and progress["current"]["ready"] > 0 and not progress["is_last_batch"]


def _keep_best(trainer: Trainer, callback: ModelCheckpoint, state: dict[str, Any]) -> None:
    """Let a resumed callback know the scores and files of its checkpoints, which Lightning drops for a new folder.

    Args:
        trainer: The trainer.
        callback: A callback that has been set up.
        state: Its state in the checkpoint, which is changed.
    """
    beside = Path(trainer.ckpt_path or "").parent

    def found(path: str) -> str | None:
        # A folder that was moved takes its checkpoints along.
        return next((str(p) for p in (Path(path), beside / Path(path).name) if path and p.is_file()), None)

    paths = {path: found(path) for path in {state["best_model_path"], *state["best_k_models"]} if path}
    paths = trainer.strategy.broadcast(paths)  # The first process may be the only one to see the disk.
    if state["best_model_path"] and paths[state["best_model_path"]] is None:
        level = logging.WARNING if callback.monitor is not None else logging.DEBUG
        logger.log(
            level, "the best checkpoint so far, %s, is gone; the next one counts as best.", state["best_model_path"]
        )
        best: dict[str, torch.Tensor] = {}
    else:
        best = {new: score for path, score in state["best_k_models"].items() if (new := paths[path]) is not None}
    state["best_k_models"] = best
    state["best_model_path"] = paths.get(state["best_model_path"]) or ""
    if not best and callback.monitor is not None:
        state["best_model_score"] = None
    worst = (max if callback.mode == "min" else min)(best, key=lambda path: float(best[path]), default="")
    state["kth_best_model_path"] = worst
    state["kth_value"] = best.get(worst, callback.kth_value)
    state["dirpath"] = callback.dirpath
