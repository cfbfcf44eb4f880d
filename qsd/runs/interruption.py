"""A checkpoint when a scheduler or the user stops a training."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException

from qsd.errors import QsdError
from qsd.runs.folders import CHECKPOINTS, run_folder
from qsd.stopping import StopRequest

INTERRUPTED = "interrupted.ckpt"


class SaveOnStop(Callback):
    """On SIGTERM or Ctrl-C, finish the batch, save ``checkpoints/interrupted.ckpt`` and stop the training.

    The training goes on from this file with the batch that would have come next. A validation is cut short, and left
    out of the resumed training; several processes finish it first.

    Attributes:
        message: How the training ended and how it goes on, once it was stopped.
    """

    def __init__(self) -> None:
        self.message: str | None = None
        self._request = StopRequest()
        self._validating = False
        self._before_validation: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handlers: its own one ends a process at different batches than the others."""
        self.message, self._validating = None, False
        self._request.listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if that was asked for, in all processes after the same batch."""
        self._before_validation = trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict()
        asked = self._request.received is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            self._stop(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop a validation of one process; several ones may have different numbers of batches."""
        if self._request.received is None or trainer.sanity_checking or trainer.world_size > 1:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                callback.on_validation_epoch_end(trainer, pl_module)  # It gives the network its raw weights again.
        self._validating = True
        self._stop(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint from within a validation be one of the batch before it: Lightning resumes no validation."""
        if not self._validating:
            return
        progress = checkpoint["loops"]["fit_loop"]
        for part in ("total", "current"):
            progress["epoch_loop.batch_progress"][part]["completed"] -= 1
        progress["epoch_loop.val_loop.batch_progress"] = self._before_validation

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the last epoch, or handle signals as before: what comes now can be interrupted at any point."""
        self._request.forget()
        if self._request.received is not None:
            self._end(f"{self._name} came after the last batch; all checkpoints are complete.")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Handle signals as before."""
        self._request.forget()
        if self._request.received is not None and self.message is None:
            self.message = f"stopped by {self._name} within a batch; --ckpt_path last goes on from the last checkpoint."

    @property
    def _name(self) -> str:
        return self._request.name

    def _stop(self, trainer: Trainer) -> None:
        path = run_folder(trainer) / CHECKPOINTS / INTERRUPTED
        message = f"stopped by {self._name}; go on with --ckpt_path {path}"
        if not trainer.checkpoint_callbacks:
            message = f"stopped by {self._name}; nothing was saved, because checkpoints are switched off."
        else:
            try:
                trainer.save_checkpoint(path)
            except QsdError as error:  # The exit code tells of the signal also where the disk is full.
                message = f"stopped by {self._name}, but no checkpoint could be saved: {error}"
        self._end(message)

    def _end(self, message: str) -> None:
        self.message = message
        raise KeyboardInterrupt if self._name == "Ctrl-C" else SIGTERMException
