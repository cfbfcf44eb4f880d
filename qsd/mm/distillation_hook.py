"""Distillation of a backbone's attention while a detector or segmenter is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from qsd.distillation import AttentionRecorder, Teacher, attention_loss, build_teacher
from qsd.distillation.schedule import Weight, weight_at, weight_points
from qsd.distillation.teacher import both_statistics
from qsd.errors import QsdError
from qsd.mm.loading import load_model, unwrapped

_SCALE = 255.0  # grey levels in full scale: OpenMMLab normalises by the former


@HOOKS.register_module()
class DistillationHook(Hook):
    """Train a backbone to attend as a teacher does.

    The twin of `qsd.callbacks.Distillation`: the token similarities of the backbone's queries, keys and values are
    drawn to the teacher's, in every attention layer. The terms are added to the model's losses, under the names
    ``loss_query``, ``loss_key`` and ``loss_value``, each as it enters their sum. The teacher is outside the model, its
    checkpoints and averages.

    Args:
        teacher: a checkpoint of a training of a float twin: a detector or segmenter (``.pth``, of which the backbone is
            taken) or a classifier (``.ckpt``); or a model's name, see `qsd.callbacks.Distillation`.
        teacher_weights: weights of a model by name.
        teacher_args: further arguments of a model by name, or of a classifier's checkpoint.
        teacher_mean: mean of the images that the teacher expects, by channel, in units of full scale. By default a
            checkpoint or model of ours sees what the student sees, and another model what timm says.
        teacher_std: their standard deviation.
        weight: of the loss, which is a sum over layers, heads and query, key, value: a number, or points (share of the
            training from 0 to 1, weight), between which it is linear. While it is zero the teacher does not run.

    Raises:
        QsdError: for a teacher that is missing or has no attention, and for a weight that cannot be.
    """

    def __init__(
        self,
        teacher: str,
        teacher_weights: str | None = None,
        teacher_args: dict[str, Any] | None = None,
        teacher_mean: Sequence[float] | None = None,
        teacher_std: Sequence[float] | None = None,
        weight: Weight = 0.01,
    ) -> None:
        self._points = weight_points("weight", weight)
        if not any(value for _, value in self._points):
            raise QsdError("weight is 0: nothing is distilled.")
        self._source = (teacher, teacher_weights, teacher_args)
        self._statistics = both_statistics(teacher_mean, teacher_std)
        self._teacher: Teacher | None = None
        self._recorder: AttentionRecorder | None = None

    def before_train(self, runner: Runner) -> None:
        """Build the teacher, tap the backbone, and put the terms among the model's losses."""
        model = unwrapped(runner.model)
        recorder = self._recorder = AttentionRecorder(model.backbone)
        if not recorder.layers:
            raise QsdError(
                f"the backbone, a {type(model.backbone).__name__}, has no attention with q_neuron, k_neuron and "
                "v_neuron; use a SpikeTransformerBackbone."
            )
        teacher = self._teacher = self._build()
        teacher.network.to(next(model.parameters()).device)
        statistics = _statistics(model.data_preprocessor)
        original = model.loss

        def loss(inputs: Any, data_samples: Any) -> dict[str, Any]:
            weight = weight_at(runner.iter / runner.max_iters, self._points)
            if weight == 0:
                return original(inputs, data_samples)
            recorder.start()
            losses = original(inputs, data_samples)
            students = recorder.take()
            _, teachers = teacher(inputs, statistics)
            terms = attention_loss(students, teachers)
            return {**losses, **{f"loss_{name}": weight * term for name, term in terms.items()}}

        # The model's own method is found behind it again when it is taken off.
        model.loss = loss

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it would be without distillation."""
        model = unwrapped(runner.model)
        vars(model).pop("loss", None)
        if self._recorder is not None:
            self._recorder.remove()
        self._teacher = self._recorder = None

    def _build(self) -> Teacher:
        path, weights, _ = self._source
        if Path(path).suffix != ".pth" or weights is not None:
            return build_teacher(*self._source, self._statistics)
        model, _ = load_model(path)
        return Teacher(getattr(model.backbone, "model", model.backbone), path, self._statistics)


def _statistics(preprocessor: Any) -> tuple[list[float], list[float]] | None:
    if not getattr(preprocessor, "_enable_normalize", False):
        return None
    mean, std = (getattr(preprocessor, key).flatten() / _SCALE for key in ("mean", "std"))
    return mean.tolist(), std.tolist()
