"""Finding the layer in which a training broke."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def non_finite_parameter(model: nn.Module) -> str | None:
    """The name of the first parameter that holds infinities or NaNs, if any.

    Args:
        model: Any module.
    """
    return next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)


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
