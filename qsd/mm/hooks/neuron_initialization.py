"""Initialisation of the neurons' learned steps from the first batch of a training with mmengine's Runner."""

from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from qsd.mm.loading import unwrapped
from qsd.training.neuron_initialization import has_contrast, initialize_from_batch


class _Losses(nn.Module):
    """A model as a function of a batch, so that all of its neurons run as in training."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        data = self.model.data_preprocessor(batch, True)
        return self.model(**data, mode="loss")


@HOOKS.register_module()
class NeuronInitializationHook(Hook):
    """Set the learned steps of neurons from the first training batch, unless the weights contain them.

    The counterpart of the initialisation in `qsd.tasks.ClassificationTask`. ``tools/mmdet_train.py`` and
    ``tools/mmseg_train.py`` add this hook to every training.
    """

    def __init__(self) -> None:
        self._done = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """A checkpoint of the whole model contains all step sizes."""
        self._done = True

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Initialise once."""
        model = unwrapped(runner.model)
        if self._done or data_batch is None or getattr(model.backbone, "steps_are_set", False):
            return
        usable = torch.tensor(float(has_contrast(data_batch["inputs"])))
        if dist.get_world_size() > 1:
            usable = usable.to(dist.get_comm_device())
            dist.all_reduce(usable, "min")
        if not usable:
            return  # Images of one colour give steps near zero.
        self._done = True
        initialize_from_batch(_Losses(model), data_batch, _average if dist.get_world_size() > 1 else None)


def _average(step: Tensor) -> Tensor:
    """The mean over all processes."""
    dist.all_reduce(step, "mean")
    return step
