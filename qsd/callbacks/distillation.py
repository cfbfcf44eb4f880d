"""Distillation during training with Lightning."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from qsd.distillation.terms import DistillationOptions, DistillationTerms
from qsd.errors import QsdError


class Distillation(Callback):
    """Train a student to attend, and to classify, like a teacher.

    In every attention layer, the loss aligns the token similarities of the student's queries, keys and values with
    those of the teacher (`qsd.distillation.similarity`). This is the upper level of QSD-Transformer's optimisation;
    the published code lacks it, and the loss is a reconstruction. Logged: ``train/loss_query``, ``train/loss_key``,
    ``train/loss_value`` and ``train/loss_logits``, each times its weight. The teacher belongs to the callback and is
    outside of every module, checkpoint, average and process group. With ``--model.compile`` it is compiled, too, if its
    logits alone are distilled.

    Args:
        teacher: Checkpoint of a training with qsd, or the name of a model.
        teacher_weights: Weights of a model by name.
        teacher_args: Further arguments of the teacher's model.
        **options: Further fields of `qsd.distillation.DistillationOptions`.

    Raises:
        QsdError: For a teacher that is missing, does not fit, or has no attention where it is needed.
    """

    def __init__(
        self,
        teacher: str,
        teacher_weights: str | None = None,
        teacher_args: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = DistillationOptions(teacher, teacher_weights, teacher_args, **options)
        self.terms: DistillationTerms | None = None
        self._teacher: Any = None
        self._trainer: Trainer | None = None
        self._steps = 1.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the teacher, so that a wrong one is reported before anything else happens."""
        if stage != "fit":
            return
        if not hasattr(pl_module, "add_auxiliary_loss"):
            raise QsdError(
                f"{type(pl_module).__name__} takes no further losses; distillation needs a task with "
                "add_auxiliary_loss, such as qsd.tasks.ClassificationTask."
            )
        self._teacher = self.options.build_teacher()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the student's attention, and move the teacher to the student's device and precision."""
        task: Any = pl_module
        self.terms = DistillationTerms(self.options, self._teacher, getattr(task, "model", task))
        plugin = trainer.strategy.precision_plugin
        self._teacher.network = plugin.convert_module(self._teacher.network).to(trainer.strategy.root_device)
        how = getattr(task, "hparams", {}).get("compile")
        if how and not self.options.teaches_attention:  # Hooks record attention, and would be traced with the network.
            self._teacher.network.compile(backend="inductor" if how is True else how)
        self._trainer = trainer
        task.add_auxiliary_loss(self._loss, teaches_logits=self.options.teaches_logits)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the length of the training once, for schedules."""
        self._steps = trainer.estimated_stepping_batches

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the student's attention in the forward pass that follows."""
        assert self.terms is not None
        self.terms.start()

    def _loss(self, images: Tensor, logits: Tensor) -> dict[str, Tensor]:
        assert self.terms is not None
        assert self._trainer is not None
        data: Any = getattr(self._trainer, "datamodule", None)
        statistics = (data.mean, data.std) if hasattr(data, "mean") and hasattr(data, "std") else None
        return self.terms(self._trainer.global_step / self._steps, images, logits, statistics)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the student as it would be without distillation."""
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the student as it would be without distillation."""
        self._release(pl_module)

    def _release(self, task: Any) -> None:
        if self.terms is not None:
            self.terms.remove()
        if hasattr(task, "remove_auxiliary_loss"):
            task.remove_auxiliary_loss(self._loss)
        self.terms = self._teacher = self._trainer = None
