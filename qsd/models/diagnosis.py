"""Finding the layer in which a training broke."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qsd.neurons import LearnedStepNeuron
from qsd.quantizers import StepSizeQuantizer


def non_finite_parameter(model: nn.Module) -> str | None:
    """The name of the first parameter that holds infinities or NaNs, if any.

    Args:
        model: Any module.
    """
    return next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)


def learned_steps(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learned steps of quantizers and neurons, by the dotted names of their modules.

    Args:
        model: Any module.
    """
    return {
        name: parameter
        for name, module in model.named_modules()
        if isinstance(module, StepSizeQuantizer | LearnedStepNeuron)
        for parameter in module.parameters(recurse=False)
    }


def collapsed_step(model: nn.Module) -> tuple[str, float] | None:
    """The first quantizer or neuron with a step size that is not positive, and that step size.

    Args:
        model: Any module.
    """
    steps = learned_steps(model)
    if not steps:
        return None
    # One comparison for all: this runs after every step, and each comparison waits for the GPU.
    if bool((torch.cat([step.detach().flatten() for step in steps.values()]) > 0).all()):
        return None
    return next((name, step.min().item()) for name, step in steps.items() if not bool((step > 0).all()))


def first_non_finite(model: nn.Module, images: Tensor) -> str:
    """The place where infinities or NaNs first appear in a forward pass, in one phrase.

    Args:
        model: The network, which is run once more.
        images: The batch ``[B, C, H, W]``.
    """
    if not torch.isfinite(images).all():
        return "the images"
    if (name := non_finite_parameter(model)) is not None:
        return f"parameter {name}"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(f"the output of layer {name}")

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself"
