"""Distillation of a backbone's attention during training with mmengine's Runner."""

import warnings
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from qsd.distillation import Teacher
from qsd.distillation.terms import DistillationOptions, DistillationTerms
from qsd.errors import QsdError
from qsd.mm.loading import load_model, unwrapped

_SCALE = 255.0  # Grey levels in full scale: OpenMMLab normalises in grey levels.


@HOOKS.register_module()
class DistillationHook(Hook):
    """Train a backbone to attend like a teacher.

    The counterpart of `qsd.callbacks.Distillation`, without logits. The terms ``loss_query``, ``loss_key`` and
    ``loss_value`` are added to the model's losses, each times its weight. The teacher is outside of the model, its
    checkpoints and averages.

    Args:
        teacher: Checkpoint of a float twin: a detector or segmenter (``.pth``, of which the backbone is taken) or a
            classifier (``.ckpt``); or the name of a model.
        teacher_weights: Weights of a model by name.
        teacher_args: Further arguments of the teacher's model.
        weight: Deprecated name of ``attention_weight``.
        **options: Further fields of `qsd.distillation.DistillationOptions`, but for those of logits.

    Raises:
        QsdError: For a teacher that is missing or has no attention, and for weights out of range.
    """

    def __init__(
        self,
        teacher: str,
        teacher_weights: str | None = None,
        teacher_args: dict[str, Any] | None = None,
        weight: Any = None,
        **options: Any,
    ) -> None:
        if weight is not None:
            warnings.warn("DistillationHook: weight is now called attention_weight.", FutureWarning, stacklevel=2)
            options["attention_weight"] = weight
        if {"logits_weight", "logits_kind", "temperature"} & options.keys():
            raise QsdError("DistillationHook distils attention alone: detectors and segmenters have no image logits.")
        self.options = DistillationOptions(teacher, teacher_weights, teacher_args, **options)
        self.terms: DistillationTerms | None = None

    def before_train(self, runner: Runner) -> None:
        """Build the teacher, record the backbone's attention, and add the terms to the model's losses."""
        model = unwrapped(runner.model)
        teacher = self._build_teacher()
        terms = self.terms = DistillationTerms(self.options, teacher, model.backbone)
        teacher.network.to(next(model.parameters()).device)
        statistics = _statistics(model.data_preprocessor)
        original = model.loss

        def loss(inputs: Any, data_samples: Any) -> dict[str, Any]:
            terms.start()
            losses = original(inputs, data_samples)
            return {**losses, **terms(runner.iter / runner.max_iters, inputs, None, statistics)}

        # The model's own method is found again when this attribute is removed.
        model.loss = loss

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it would be without distillation."""
        vars(unwrapped(runner.model)).pop("loss", None)
        if self.terms is not None:
            self.terms.remove()
        self.terms = None

    def _build_teacher(self) -> Teacher:
        path = self.options.teacher
        if Path(path).suffix != ".pth" or self.options.teacher_weights is not None:
            return self.options.build_teacher()
        model, _ = load_model(path)
        return Teacher(getattr(model.backbone, "model", model.backbone), path, self.options.statistics())


def _statistics(preprocessor: Any) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of the images in units of full scale, or ``None`` if they are not normalised."""
    if not getattr(preprocessor, "_enable_normalize", False):
        return None
    mean, std = (getattr(preprocessor, key).flatten() / _SCALE for key in ("mean", "std"))
    return mean.tolist(), std.tolist()
