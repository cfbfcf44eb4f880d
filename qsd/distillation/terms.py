"""Distillation as terms of a training loss, without a framework: options, teacher, and the weighted terms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qsd.distillation.attention import AttentionRecorder
from qsd.distillation.losses import LogitsKind, attention_loss, logits_loss
from qsd.distillation.schedule import Weight, weight_at, weight_points
from qsd.distillation.teacher import Statistics, Teacher, both_statistics, build_teacher
from qsd.errors import QsdError


@dataclass(frozen=True)
class DistillationOptions:
    """Teacher and loss weights of a distillation.

    A weight is a number or a schedule: points (share of the training from 0 to 1, weight) with linear interpolation.
    While all weights are zero, the teacher does not run.

    Attributes:
        teacher: Checkpoint of a training with qsd, or the name of a model: a float twin (``qsd_15m_ann``) with
            ``teacher_weights``, a model whose weights ship with qsd (``qsd_tiny.digits``), or any vision transformer of
            timm.
        teacher_weights: Weights of a model by name: a checkpoint, a ``.safetensors`` file or a state dict; ``None``
            downloads the weights that timm distributes.
        teacher_args: Further arguments of the teacher's model.
        teacher_mean: Mean by channel of the images that the teacher expects, in units of full scale. By default, a
            checkpoint, or a model of qsd with ``teacher_weights``, gets the student's images, and another model the
            normalisation in its timm configuration.
        teacher_std: Standard deviation by channel of these images.
        attention_weight: Weight of the attention loss, which is a sum over layers, heads and query, key, value.
        logits_weight: Weight of the logits loss.
        logits_kind: ``"soft"`` for the teacher's probabilities, ``"hard"`` for its most likely class.
        temperature: Temperature of the soft probabilities.

    Raises:
        QsdError: For weights and temperatures out of range, and if only one of mean and standard deviation is given.
    """

    teacher: str
    teacher_weights: str | None = None
    teacher_args: dict[str, Any] | None = None
    teacher_mean: Sequence[float] | None = None
    teacher_std: Sequence[float] | None = None
    attention_weight: Weight = 0.01
    logits_weight: Weight = 0.0
    logits_kind: LogitsKind = "soft"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise QsdError(f"temperature={self.temperature} is not positive.")
        if self.logits_kind not in ("soft", "hard"):
            raise QsdError(f"logits_kind={self.logits_kind!r} is unknown; use 'soft' or 'hard'.")
        weights = self.weights()
        if not any(value for points in weights for _, value in points):
            raise QsdError("attention_weight and logits_weight are both 0: nothing is distilled.")
        self.statistics()

    def weights(self) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        """The schedules of the attention loss and of the logits loss."""
        return (
            weight_points("attention_weight", self.attention_weight),
            weight_points("logits_weight", self.logits_weight),
        )

    @property
    def teaches_logits(self) -> bool:
        """Whether the logits loss has a weight at any time."""
        return any(weight for _, weight in self.weights()[1])

    @property
    def teaches_attention(self) -> bool:
        """Whether the attention loss has a weight at any time."""
        return any(weight for _, weight in self.weights()[0])

    def statistics(self) -> Statistics | None:
        """Mean and standard deviation of the teacher's images, or ``None`` for the default."""
        return both_statistics(self.teacher_mean, self.teacher_std)

    def build_teacher(self) -> Teacher:
        """Build the teacher.

        Raises:
            QsdError: If it is missing or cannot be built.
        """
        return build_teacher(self.teacher, self.teacher_weights, self.teacher_args, self.statistics())


class DistillationTerms:
    """The weighted terms of a distillation loss. It is no module, so that no model contains the teacher.

    Args:
        options: Teacher and weights.
        teacher: The teacher, on the device and in the precision of the training.
        student: The network whose attention is recorded.

    Raises:
        QsdError: If teacher and student have different classes, or the student has no attention, where they matter.
    """

    def __init__(self, options: DistillationOptions, teacher: Teacher, student: nn.Module) -> None:
        self.options, self.teacher = options, teacher
        self._attention, self._logits = options.weights()
        if any(weight for _, weight in self._logits):
            _check_classes(teacher, student)
        self._recorder: AttentionRecorder | None = None
        if any(weight for _, weight in self._attention):
            self._recorder = AttentionRecorder(student)
            if not self._recorder.layers:
                raise QsdError(
                    f"the student, a {type(student).__name__}, has no attention with q_neuron, k_neuron and v_neuron; "
                    "use attention_weight=0, or a spike-driven transformer."
                )

    def start(self) -> None:
        """Record the student's attention in the forward pass that follows."""
        if self._recorder is not None:
            self._recorder.start()

    def __call__(
        self, progress: float, images: Tensor, logits: Tensor | None, statistics: Statistics | None
    ) -> dict[str, Tensor]:
        """The weighted terms of a batch, after the student's forward pass.

        Args:
            progress: Share of the training that is done, 0 to 1.
            images: The student's images ``[B, C, H, W]``.
            logits: The student's logits ``[B, classes]``; ``None`` if they are not distilled.
            statistics: Mean and standard deviation that the images were normalised with, if they are known.

        Returns:
            Scalars ``loss_query``, ``loss_key``, ``loss_value`` and ``loss_logits`` where their weight is not zero.
        """
        attention_weight, logits_weight = weight_at(progress, self._attention), weight_at(progress, self._logits)
        students = self._recorder.take() if self._recorder is not None else []
        if attention_weight == logits_weight == 0:
            return {}
        taught, teachers = self.teacher(images, statistics, attention=attention_weight > 0)
        terms = {}
        if attention_weight > 0:
            losses = attention_loss(students, teachers)
            terms = {f"loss_{name}": attention_weight * loss for name, loss in losses.items()}
        if logits_weight > 0:
            assert logits is not None
            loss = logits_loss(logits, taught, self.options.logits_kind, self.options.temperature)
            terms["loss_logits"] = logits_weight * loss
        return terms

    def remove(self) -> None:
        """Remove the hooks from the student."""
        if self._recorder is not None:
            self._recorder.remove()


def _check_classes(teacher: Teacher, student: Any) -> None:
    classes = getattr(student, "num_classes", None)
    if classes is not None and teacher.num_classes != classes:
        raise QsdError(
            f"teacher {teacher.name} has {teacher.num_classes} classes, the student {classes}: their logits cannot be "
            "compared. Use logits_weight=0, or a teacher that was trained on the same classes."
        )
