"""The arithmetic of float32 on devices that would shorten it, and warnings where it is shortened."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 in full precision while this context, or the function that it decorates, runs.

    On CUDA, PyTorch computes convolutions of float32 in TF32 by default: operands keep 10 bits of their fraction. A
    membrane potential within some 1e-3 steps of a threshold may then be rounded to the other side, which changes the
    spike count. (Ours.)
    """
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # PyTorch 2.9 and later
        places = [backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul]
        settings: list[tuple[Any, str, Any]] = [(place, "fp32_precision", "ieee") for place in places]
    else:
        settings = [(place, "allow_tf32", False) for place in (backends.cudnn, backends.cuda.matmul)]
    before = [getattr(place, name) for place, name, _ in settings]
    try:
        for setting in settings:
            setattr(*setting)
        yield
    finally:
        for (place, name, _), value in zip(settings, before, strict=True):
            setattr(place, name, value)


AUTOCAST = (
    "autocast computes membrane potentials in {dtype} and rounds some of them to the other side of a threshold: spike "
    "counts and classes differ from those in float32 (of a network trained on digits, a tenth of the counts and 1.5 % "
    "of the classes)."
)


def warn_of_autocast(device: str) -> None:
    """Warn that spike counts are not those of float32 if autocast is on; Python shows a warning once by default.

    Args:
        device: Type of the device, such as ``"cpu"``.
    """
    if torch.is_autocast_enabled(device):
        dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        warnings.warn(f"{AUTOCAST.format(dtype=dtype)} Run converted networks without autocast.", stacklevel=3)
