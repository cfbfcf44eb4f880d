"""The switch between memory-lean training and ordinary layers."""

from typing import Literal

from torch import nn

from qsd.errors import QsdError

# The setting of a layer: memory-lean training on, off, or as was measured fastest on the kind of device.
Choice = bool | Literal["auto"]

# Whether a layer trains in the memory-lean way, by its setting and by whether its input lies on a CUDA device. It is a
# table, because a function call for each layer and pass would take time. "auto" rests on measurements of qsd_15m at 224
# pixels in float32, not compiled: on two cores a step takes 1.14 times the float twin's with it and 1.11 times without
# it, for 0.43 of the memory; on one H100 it takes 1.59 and 1.19 times.
TRAINS_LEAN: dict[tuple[Choice, bool], bool] = {
    ("auto", False): True,
    ("auto", True): False,
    (True, False): True,
    (True, True): True,
    (False, False): False,
    (False, True): False,
}


def has_hooks(module: nn.Module) -> bool:
    """Whether forward or backward hooks are registered, which have to see the module's own input and output.

    Args:
        module: Any module.
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def set_lean(model: nn.Module, enable: Choice = "auto") -> None:
    """Switch between memory-lean training and ordinary layers that keep floats.

    Memory-lean layers keep spike counts in half a byte, quantize weights again instead of keeping them, and run the
    norms of a chain together. Outputs and gradients are the same, bit by bit for neurons, convolutions and products, up
    to rounding for two norms in a row and learned steps. Evaluation, compiled training and checkpoints do not change.

    Args:
        model: Any module; neurons, layers and chains are found at any depth.
        enable: Whether layers train in the memory-lean way. ``"auto"``, the setting of a new network, is ``False`` for
            inputs on CUDA devices and ``True`` elsewhere, decided in each forward pass.

    Raises:
        QsdError: For any other setting.
    """
    if enable not in ("auto", True, False):
        raise QsdError(f"lean={enable!r} is unknown; use 'auto', true or false.")
    for module in model.modules():
        if hasattr(module, "lean"):
            module.lean = enable  # type: ignore[assignment]
