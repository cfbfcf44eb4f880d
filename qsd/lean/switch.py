"""The switch between memory-lean training and ordinary layers."""

import operator
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from qsd.errors import QsdError

# The setting of a layer: memory-lean training on, off, or chosen by the device and the size of the input.
Choice = bool | Literal["auto"]

# The number of elements of a layer's input from which on "auto" trains it in the memory-lean way on a processor. The
# codes of a smaller tensor save less than 1.2 MB, and take as long for the calls of PyTorch as for the elements: with
# all layers memory-lean, a step of qsd_tiny (32 pixels, one thread) takes 1.17 times as long as with none at batch 32
# and 1.08 times at batch 128; with this bound, 1.01 and 1.02 times, and 1.01 and 1.04 with two threads. At 224 pixels
# and batch 8, every layer of qsd_15m and csdformer_8_384 but the classifier is above the bound.
SMALLEST = 2**18
# Tensors of other classes may not have the memory that codes are compared with.
_TENSORS = (Tensor, nn.Parameter, FakeTensor)


def trains_lean(setting: Choice, x: Tensor) -> bool:
    """Whether a layer trains in the memory-lean way in this forward pass.

    A neuron and the layer behind it may decide otherwise, for a layer believes no note without comparing it. Then the
    tensor between them is kept as it is.

    Args:
        setting: Setting of the layer. ``"auto"`` rests on measurements of qsd_15m at 224 pixels in float32, not
            compiled: on two cores a step takes 1.14 times the float twin's with it and 1.11 times without it, for 0.43
            of the memory; on one H100 it takes 1.68 and 1.33 times.
        x: Its input.
    """
    # Before the size, which a compiler would fix.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) not in _TENSORS:
        return False
    if setting == "auto":
        return x.numel() >= SMALLEST and not x.is_cuda
    return setting


# A module's hooks, in four dictionaries, without a call of Python for those who ask in every forward pass.
hooks_of = operator.attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether forward or backward hooks are registered, which have to see the module's own input and output.

    Args:
        module: Any module.
    """
    return any(hooks_of(module))


def set_lean(model: nn.Module, enable: Choice = "auto") -> None:
    """Switch between memory-lean training and ordinary layers that keep floats.

    Memory-lean layers keep spike counts in half a byte, quantize weights again instead of keeping them, and run the
    norms of a chain together. Outputs and gradients are the same, bit by bit for neurons, convolutions and products, up
    to rounding for two norms in a row and learned steps. Evaluation, compiled training and checkpoints do not change.

    Args:
        model: Any module; neurons, layers and chains are found at any depth.
        enable: Whether layers train in the memory-lean way. ``"auto"``, the setting of a new network, is ``False`` for
            inputs on CUDA devices and inputs of fewer than 262,144 elements, and else ``True``, decided by each layer
            in each forward pass.

    Raises:
        QsdError: For any other setting.
    """
    if enable not in ("auto", True, False):
        raise QsdError(f"lean={enable!r} is unknown; use 'auto', true or false.")
    for module in model.modules():
        if hasattr(module, "lean"):
            module.lean = enable  # type: ignore[assignment]
