"""Initialisation of the neurons' learned steps from the first batch of a training."""

from typing import Any

from torch import Tensor

from qsd.layers.frames import channels_last
from qsd.training.neuron_initialization import has_contrast, initialize_from_batch


def set_neurons(task: Any, images: Tensor) -> bool:
    """Set the learned steps of a task's neurons from a training batch.

    Args:
        task: The task of a training.
        images: Images ``[B, C, H, W]`` of this process.

    Returns:
        Whether the steps were set. A batch of images of one colour, such as black ones, would give steps near zero.
    """
    strategy = task.trainer.strategy
    if not strategy.reduce_boolean_decision(has_contrast(images)):
        return False

    def average(step: Tensor) -> Tensor:
        reduced = strategy.reduce(step, reduce_op="mean")
        assert isinstance(reduced, Tensor)
        return reduced

    several = task.trainer.world_size > 1
    initialize_from_batch(task.model, channels_last(images), average if several else None)
    return True
