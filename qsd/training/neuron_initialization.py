"""Initialisation of the neurons' learned steps from a batch, in one or several processes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qsd.layers import initialize_neurons
from qsd.layers.steps import learned_steps


def has_contrast(images: Iterable[Tensor]) -> bool:
    """Whether a batch tells anything of the inputs of neurons: all of it is finite, and not every image has one colour.

    Args:
        images: Images ``[C, H, W]``, or vectors of features.
    """
    tensors = list(images)
    colours = [image.flatten(1) if image.dim() > 1 else image[None] for image in tensors]
    contrast = torch.stack([(colour.amax(1) > colour.amin(1)).any() for colour in colours])
    return bool(contrast.any() & torch.stack([image.isfinite().all() for image in tensors]).all())


def initialize_from_batch(
    model: nn.Module,
    images: Any,
    average: Callable[[Tensor], Tensor] | None = None,
) -> int:
    """Set the learned steps of a model's neurons from a batch (see `qsd.initialize_neurons`).

    Args:
        model: Any module.
        images: Training batch of this process as the model takes it, such as images ``[B, C, H, W]``.
        average: Mean of a tensor over all processes, each of which sees a batch of its own; ``None`` for one process.

    Returns:
        The number of neurons whose step was set.
    """
    count = initialize_neurons(model, images)
    if count and average is not None:
        for step in learned_steps(model).values():
            step.data.copy_(average(step.data.clone()))
    return count
