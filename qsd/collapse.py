"""A warning for training loops of one's own: a step size that is no longer positive.

An optimizer can move a learned step size through zero. Weights then change their sign, and counts are those of another
network, without an error. Trainings of `qsd` stop there with the name of the layer; this module tells everybody else.
"""

import warnings
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_EVERY = 100  # changes of a step size on a CUDA device, where each look waits for the device
_told = False
_changes: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()


def expect_steps() -> None:
    """Let the next step size that collapses be told, as a new model has been built."""
    global _told
    _told = False


def watch_step(owner: nn.Module, step: Tensor) -> None:
    """Warn if a step size is not positive, in training, once for the models that exist.

    Args:
        owner: Quantizer or neuron.
        step: Its learned step sizes, any shape.
    """
    global _told
    if _told or not (owner.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return
    if type(step) is not nn.Parameter or step.is_inference() or step.is_meta:
        return
    version, number = _changes.get(owner, (-1, 0))
    if step._version == version:
        return
    _changes[owner] = step._version, number + 1
    if step.is_cuda and number % _EVERY:
        return
    lowest = float(step.detach().min())
    if not lowest > 0:
        _told = True
        warnings.warn(
            f"A learned step size of {owner} has become {lowest:.3g}: step sizes have to stay positive, and this is "
            "another network now. Lower their learning rate; qsd.layers.steps.collapsed_step(model) names the layer.",
            stacklevel=2,
        )
