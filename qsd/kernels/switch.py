"""The one place that decides whether a fused kernel or PyTorch computes.

Nothing here imports Triton: `set_kernels` does, when kernels are switched on.
"""

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from qsd.errors import QsdError

# The types of the kernels' tensors, and their names in Triton.
KINDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# The classes of tensors that kernels read; the memory of others may be elsewhere.
CLASSES = (Tensor, torch.nn.Parameter)
# The types of devices on which kernels compute. Callers look whether it is empty before they call `computes`, so that
# processors, which have no kernels, pay for no call.
devices: frozenset[str] = frozenset()
# Positions in memory are numbers of 32 bits in the kernels.
_MOST = 2**31 - 2**16


def set_kernels(enable: bool | Literal["auto"] = "auto") -> None:
    """Choose between fused Triton kernels and PyTorch's operators for neurons and weight quantizers on CUDA devices.

    Outputs and gradients are the same bits, but for the sums in the gradients of learned thresholds and steps, which
    run in another order. Tensors on other devices, and in float64, are always PyTorch's.

    Args:
        enable: ``True`` for kernels, under ``torch.compile`` too; ``False`` for PyTorch; ``"auto"``, the default, for
            what was measured faster on CUDA devices. That is PyTorch: on an H100 a training step took 0.95 to 0.99 of
            the time with kernels in float32, and 1.1 to 1.2 of it under autocast.

    Raises:
        QsdError: If kernels are asked for where there is no Triton or no CUDA device, or the argument is unknown.
    """
    global devices
    if not isinstance(enable, bool) and enable != "auto":
        raise QsdError(f"enable={enable!r} is unknown; use True, False or 'auto'.")
    if enable is True and importlib.util.find_spec("triton") is None:
        raise QsdError("There is no Triton, which the kernels are written in; install it or use set_kernels(False).")
    if enable is True and not torch.cuda.is_available():
        raise QsdError("There is no CUDA device, which the kernels run on; use set_kernels(False).")
    devices = frozenset(["cuda"]) if enable is True else frozenset()


def computes(x: Tensor, *others: Tensor | float | None) -> bool:
    """Whether kernels compute with a tensor: its device, type, class and size are theirs.

    Args:
        x: The tensor that is read element by element.
        others: Thresholds and amplitudes, numbers or tensors without dimensions; tensors have to be float32.
    """
    if type(x) not in CLASSES and not torch.compiler.is_compiling():
        return False  # of a subclass, without memory for example
    if x.device.type not in devices or x.dtype not in KINDS or not 0 < x.numel() < _MOST:
        return False
    return len(others) == 0 or all(
        not isinstance(t, Tensor) or (t.dtype == torch.float32 and t.device == x.device) for t in others
    )
