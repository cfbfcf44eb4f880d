"""Distillation during training. The teacher lives here: outside every module, checkpoint, average and process group."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from qsd.distillation import AttentionRecorder, LogitsKind, Teacher, attention_loss, build_teacher, logits_loss
from qsd.distillation.schedule import Weight, weight_at, weight_points
from qsd.distillation.teacher import both_statistics
from qsd.errors import QsdError


class Distillation(Callback):
    """Train a student to attend, and to classify, as a teacher does.

    Attention: the token similarities of the student's queries, keys and values are drawn to the teacher's, in every
    attention layer (`qsd.distillation.similarity`). This is the upper level of QSD-Transformer's optimisation; the
    published code lacks it, and the loss is our reconstruction. Logged: ``train/loss_query``, ``train/loss_key``,
    ``train/loss_value`` and ``train/loss_logits``, each as it enters the loss.

    A weight is a number, or a schedule: points (share of the training from 0 to 1, weight), between which it is
    linear. While all weights are zero, the teacher does not run.

    Args:
        teacher: a checkpoint of a training of ours, or a model's name: one of our float twins (``qsd_15m_ann``) with
            ``teacher_weights``, or any vision transformer of timm.
        teacher_weights: weights of a model by name: a checkpoint, a ``.safetensors`` file or a state dict; ``None``
            downloads what timm distributes.
        teacher_args: further arguments of the teacher's model.
        teacher_mean: mean of the images that the teacher expects, by channel, in units of full scale. By default a
            checkpoint or model of ours sees what the student sees, and another model what timm says it was trained on.
        teacher_std: their standard deviation.
        attention_weight: weight of the attention's loss, which is a sum over layers, heads and query, key, value.
        logits_weight: weight of the logits' loss.
        logits_kind: ``"soft"``: the teacher's probabilities, or ``"hard"``: its decision.
        temperature: of the soft probabilities.

    Raises:
        QsdError: for a teacher that is missing, does not fit, or has no attention where it is asked for.
    """

    def __init__(
        self,
        teacher: str,
        teacher_weights: str | None = None,
        teacher_args: dict[str, Any] | None = None,
        teacher_mean: Sequence[float] | None = None,
        teacher_std: Sequence[float] | None = None,
        attention_weight: Weight = 0.01,
        logits_weight: Weight = 0.0,
        logits_kind: LogitsKind = "soft",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise QsdError(f"temperature={temperature} is not positive.")
        if logits_kind not in ("soft", "hard"):
            raise QsdError(f"logits_kind={logits_kind!r} is unknown; use 'soft' or 'hard'.")
        self._attention_weight = weight_points("attention_weight", attention_weight)
        self._logits_weight = weight_points("logits_weight", logits_weight)
        if not self._distils_attention and not self._distils_logits:
            raise QsdError("attention_weight and logits_weight are both 0: nothing is distilled.")
        self._source = (teacher, teacher_weights, teacher_args)
        self._statistics = both_statistics(teacher_mean, teacher_std)
        self._logits_kind: LogitsKind = logits_kind
        self._temperature = temperature
        self._teacher: Teacher | None = None
        self._recorder: AttentionRecorder | None = None
        self._trainer: Trainer | None = None
        self._steps = 1.0

    @property
    def _distils_attention(self) -> bool:
        return any(weight for _, weight in self._attention_weight)

    @property
    def _distils_logits(self) -> bool:
        return any(weight for _, weight in self._logits_weight)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the teacher, so that a wrong one is reported before anything else happens."""
        if stage != "fit":
            return
        if not hasattr(pl_module, "add_auxiliary_loss"):
            raise QsdError(
                f"{type(pl_module).__name__} takes no further losses; distillation needs a task with "
                "add_auxiliary_loss, such as qsd.tasks.ClassificationTask."
            )
        self._teacher = build_teacher(*self._source, self._statistics)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tap the student, which now exists, and bring the teacher to its device and precision."""
        assert self._teacher is not None
        student: Any = getattr(pl_module, "model", pl_module)
        if self._distils_logits:
            _check_classes(self._teacher, student)
        if self._distils_attention:
            self._recorder = AttentionRecorder(student)
            if not self._recorder.layers:
                raise QsdError(
                    f"the student, a {type(student).__name__}, has no attention with q_neuron, k_neuron and v_neuron; "
                    "use attention_weight=0, or a spike-driven transformer."
                )
        plugin = trainer.strategy.precision_plugin
        self._teacher.network = plugin.convert_module(self._teacher.network).to(trainer.strategy.root_device)
        self._trainer = trainer
        task: Any = pl_module
        task.add_auxiliary_loss(self._loss)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask once how long the training is, for schedules."""
        self._steps = trainer.estimated_stepping_batches

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record what the student attends to in the forward pass that follows."""
        if self._recorder is not None:
            self._recorder.start()

    def _loss(self, images: Tensor, logits: Tensor) -> dict[str, Tensor]:
        assert self._trainer is not None
        assert self._teacher is not None
        progress = self._trainer.global_step / self._steps
        attention_weight = weight_at(progress, self._attention_weight)
        logits_weight = weight_at(progress, self._logits_weight)
        students = self._recorder.take() if self._recorder is not None else []
        if attention_weight == logits_weight == 0:
            return {}
        data: Any = getattr(self._trainer, "datamodule", None)
        statistics = (data.mean, data.std) if hasattr(data, "mean") and hasattr(data, "std") else None
        taught, teachers = self._teacher(images, statistics, attention=attention_weight > 0)
        terms = {}
        if attention_weight > 0:
            losses = attention_loss(students, teachers)
            terms = {f"loss_{name}": attention_weight * loss for name, loss in losses.items()}
        if logits_weight > 0:
            loss = logits_loss(logits, taught, self._logits_kind, self._temperature)
            terms["loss_logits"] = logits_weight * loss
        return terms

    def _release(self, task: Any) -> None:
        if self._recorder is not None:
            self._recorder.remove()
        if hasattr(task, "remove_auxiliary_loss"):
            task.remove_auxiliary_loss(self._loss)
        self._teacher = self._recorder = self._trainer = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the student as it would be without distillation."""
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """See `on_fit_end`."""
        self._release(pl_module)


def _check_classes(teacher: Teacher, student: Any) -> None:
    classes = getattr(student, "num_classes", None)
    if classes is not None and teacher.num_classes != classes:
        raise QsdError(
            f"teacher {teacher.name} has {teacher.num_classes} classes, the student {classes}: their logits cannot be "
            "compared. Use logits_weight=0, or a teacher that was trained on the same classes."
        )
