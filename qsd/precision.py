"""The arithmetic of float32 on devices that would shorten it, and warnings where it is shortened."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn


class _Setting(NamedTuple):
    """A setting of PyTorch, its value for full float32 and that for TF32."""

    place: Any
    name: str
    full: Any
    short: Any

    @property
    def value(self) -> Any:
        """The present value."""
        return getattr(self.place, self.name)

    def set(self, value: Any) -> None:
        """Change the value."""
        setattr(self.place, self.name, value)


def _settings() -> dict[str, _Setting]:
    """The settings of convolutions and of products on CUDA devices, and those of processors."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):  # before PyTorch 2.9
        return {
            "convolutions": _Setting(backends.cudnn, "allow_tf32", False, True),
            "products": _Setting(backends.cuda.matmul, "allow_tf32", False, True),
        }
    return {
        "convolutions": _Setting(backends.cudnn.conv, "fp32_precision", "ieee", "tf32"),
        "products": _Setting(backends.cuda.matmul, "fp32_precision", "ieee", "tf32"),
        "convolutions on a processor": _Setting(backends.mkldnn.conv, "fp32_precision", "ieee", "ieee"),
        "products on a processor": _Setting(backends.mkldnn.matmul, "fp32_precision", "ieee", "ieee"),
    }


def float32_settings() -> tuple[Any, ...]:
    """The present settings of PyTorch for the arithmetic of float32."""
    return tuple(setting.value for setting in _settings().values())


class _Full:
    """How many contexts of `full_float32` are open, in all threads, and the settings before the first one."""

    lock = threading.Lock()
    contexts = 0
    before: tuple[tuple[_Setting, Any], ...] = ()


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 in full precision while this context, or the function that it decorates, runs.

    On CUDA, PyTorch computes convolutions of float32 in TF32 by default: operands keep 10 bits of their fraction. A
    membrane potential within some 1e-3 steps of a threshold may then be rounded to the other side, which changes the
    spike count. PyTorch's settings are those of the process: they return to what they were when the last of several
    contexts, nested or of other threads, ends. (Ours.)
    """
    with _Full.lock:
        if not _Full.contexts:
            _Full.before = tuple((setting, setting.value) for setting in _settings().values())
        _Full.contexts += 1
        for setting in _settings().values():
            setting.set(setting.full)
    try:
        yield
    finally:
        with _Full.lock:
            _Full.contexts -= 1
            if not _Full.contexts:
                for setting, value in _Full.before:
                    setting.set(value)


@contextmanager
def tf32() -> Iterator[None]:
    """Allow TF32 in convolutions and products on CUDA devices while this context runs, for benchmarks."""
    before = [(setting, setting.value) for setting in _settings().values()]
    try:
        for setting, _ in before:
            setting.set(setting.short)
        yield
    finally:
        for setting, value in before:
            setting.set(value)


AUTOCAST = (
    "autocast computes membrane potentials in {dtype} and rounds some of them to the other side of a threshold: spike "
    "counts and classes differ from those in float32 (of a network trained on digits, a tenth of the counts and 1.5 % "
    "of the classes)."
)
TF32 = (
    "PyTorch computes float32 {operations} in TF32 on this device, which rounds some membrane potentials to the other "
    "side of a threshold: spike counts differ from those in float32. Set {remedy}."
)
_REMEDIES = {
    "convolutions": "torch.backends.cudnn.allow_tf32 = False",
    "products": "torch.backends.cuda.matmul.allow_tf32 = False",
}
# The networks that a warning of TF32 has named already.
_WARNED: WeakSet[nn.Module] = WeakSet()


def warn_of_autocast(device: str, stacklevel: int = 3) -> None:
    """Warn that spike counts are not those of float32 if autocast is on; Python shows a warning once by default.

    Args:
        device: Type of the device, such as ``"cpu"``.
        stacklevel: Number of calls between the warning and the line that it names.
    """
    if torch.is_autocast_enabled(device):
        dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        warnings.warn(f"{AUTOCAST.format(dtype=dtype)} Run converted networks without autocast.", stacklevel=stacklevel)


def tf32_note(network: nn.Module, device: torch.device) -> str | None:
    """One line on TF32 for a network whose spike counts it could change, once for each network; else ``None``.

    Args:
        network: A network in float32.
        device: The device that it runs on.
    """
    settings = _settings() if device.type == "cuda" and network not in _WARNED else {}
    shortened = [kind for kind in _REMEDIES if kind in settings and settings[kind].value == settings[kind].short]
    if not shortened or torch.cuda.get_device_capability(device)[0] < 8:  # older devices have no TF32
        return None
    tensors = [t for t in (*network.parameters(), *network.buffers()) if t.dtype == torch.float32]
    if all(t.dim() < 3 for t in tensors):
        shortened = [kind for kind in shortened if kind != "convolutions"]
    if not shortened or not tensors:
        return None
    _WARNED.add(network)
    remedy = " and ".join(_REMEDIES[kind] for kind in shortened)
    return TF32.format(operations=" and ".join(shortened), remedy=remedy)


def warn_of_rounding(network: nn.Module, images: Tensor) -> None:
    """Warn that spike counts are not those of float32, under autocast and where PyTorch computes in TF32.

    Args:
        network: The network that is about to run.
        images: Its input.
    """
    warn_of_autocast(images.device.type, 5)
    if images.is_cuda and (note := tf32_note(network, images.device)) is not None:
        warnings.warn(note, stacklevel=4)
