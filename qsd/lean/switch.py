"""The switch between memory-efficient training and ordinary layers."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether forward or backward hooks are registered, which have to see the module's own input and output.

    Args:
        module: Any module.
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def set_lean(model: nn.Module, enable: bool = True) -> None:
    """Switch between memory-efficient training, which is the default, and ordinary layers that keep floats.

    Memory-efficient layers keep spike counts in half a byte, quantize weights again instead of keeping them, and run
    the norms of a chain together. Outputs and gradients are the same, bit by bit for neurons, convolutions and
    products, up to rounding for two norms in a row and learned steps. Evaluation and compiled training do not change.

    Args:
        model: Any module; neurons, layers and chains are found at any depth.
        enable: Whether layers train in the memory-efficient way.
    """
    for module in model.modules():
        if hasattr(module, "lean"):
            module.lean = enable  # type: ignore[assignment]
