"""Checks that stop a broken training with one line: where it broke, and which checkpoint is still good."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from qsd.errors import QsdError
from qsd.layers.integer_operands import has_counts_of_float32
from qsd.layers.steps import collapsed_step
from qsd.models.diagnosis import first_non_finite, non_finite_parameter
from qsd.precision import AUTOCAST, tf32_note


class StepSizeGuard(Callback):
    """Stop the training when a step size is no longer positive, and name its layer."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check all step sizes after each batch."""
        check_step_sizes(pl_module)


class PrecisionNote(Callback):
    """Warn once that an evaluation under autocast or in TF32 has other counts than the converted network."""

    def __init__(self) -> None:
        super().__init__()
        self._told = False

    def _tell(self, trainer: Trainer, task: LightningModule) -> None:
        if has_counts_of_float32(task):
            return
        if (note := tf32_note(task, task.device)) is not None:
            rank_zero_warn(note)
        precision = str(trainer.precision)
        if not self._told and precision.endswith("-mixed"):
            self._told = True
            dtype = "bfloat16" if precision.startswith("bf16") else "float16"
            rank_zero_warn(
                f"{AUTOCAST.format(dtype=dtype)} Converted networks run in float32; evaluate with "
                "--trainer.precision 32-true."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before validation."""
        self._tell(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a test."""
        self._tell(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before predictions."""
        self._tell(trainer, pl_module)


def check_step_sizes(task: LightningModule) -> None:
    """Refuse step sizes that are not positive.

    Args:
        task: Task of a training.

    Raises:
        QsdError: With the name and the step size of the first layer.
    """
    collapsed = collapsed_step(task)
    if collapsed is not None:
        name, value = collapsed
        raise QsdError(
            f"a step size of {name} is {value:.3g} at step {task.global_step}, not positive; {_advice(task)}"
        )


def check_loss(task: LightningModule, loss: Tensor, model: torch.nn.Module, images: Tensor) -> None:
    """Refuse a loss that is infinite or not a number.

    Args:
        task: Task of a training.
        loss: Scalar.
        model: The network, which is run once more to find the layer if the loss is not finite.
        images: The batch ``[B, C, H, W]`` that the loss was computed from.

    Raises:
        QsdError: With the first layer whose output is not finite.
    """
    if not torch.isfinite(loss):
        raise QsdError(
            f"loss is {loss.item()} at step {task.global_step} (epoch {task.current_epoch}); "
            f"first not finite: {first_non_finite(model, images)}; {_advice(task)}"
        )


def check_before_saving(task: LightningModule) -> None:
    """Refuse parameters that must not replace a good checkpoint.

    Args:
        task: Task of a training.

    Raises:
        QsdError: With the first parameter that is not finite, or the first step size that is not positive.
    """
    broken = non_finite_parameter(task)
    if broken is not None:
        raise QsdError(f"parameter {broken} is not finite at step {task.global_step}; nothing was saved.")
    check_step_sizes(task)


def _advice(task: LightningModule) -> str:
    written = (Path(getattr(c, "best_model_path", "")) for c in task.trainer.checkpoint_callbacks)
    path = max((p for p in written if p.is_file()), key=lambda p: p.stat().st_mtime, default=None)
    good = f"the last good checkpoint is {path}" if path else "no checkpoint was written yet"
    return f"training stopped, {good}; try a lower base_lr or step_lr, gradient clipping or 32-bit precision."
