"""The number formats that a benchmark computes in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qsd.precision import full_float32, tf32

# Full float32; float32 whose convolutions and products are computed in TF32; autocast to half precision.
PRECISIONS = ("float32", "tf32", "bf16", "fp16")
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Compute float32 as a precision says; under autocast, what stays in float32 is full.

    Args:
        precision: One of `PRECISIONS`.
    """
    with tf32() if precision == "tf32" else full_float32():
        yield


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of a forward pass.

    Args:
        precision: One of `PRECISIONS`.
        device: The device that it runs on.
    """
    return torch.autocast(device.type, _HALF.get(precision), enabled=precision in _HALF)


def suffix(precision: str) -> str:
    """The end of the name of a case; cases in float32 have none.

    Args:
        precision: One of `PRECISIONS`.
    """
    return "" if precision == "float32" else f", {precision}"
