"""Ranges of signals, followed through a network while it runs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qsd.spiking.layers.movement import IMAGE, UNKNOWN, Signal
from qsd.spiking.network import SpikingNetwork
from qsd.spiking.watch import Operation, Watch

_ADDITIONS = ("add", "sub", "rsub")
_SUMS = ("sum", "mean", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "cumsum")


class SignalWatch(Watch):
    """A `Watch` that knows the range and the origin of every tensor.

    Layers tell those of their output. What other operations return takes the widest range of their inputs; a sum adds
    the ranges up.

    Args:
        spiking: The network.
        report: Called with every operation outside of neurons.
    """

    def __init__(self, spiking: SpikingNetwork, report: Callable[[Operation], None]) -> None:
        super().__init__(spiking, report)
        self._signals: dict[StorageWeakRef, Signal] = {}

    def start(self, images: Tensor) -> None:
        """Forget all tensors but the images.

        Args:
            images: What the network is going to run on.
        """
        self._signals = {_key(images): UNKNOWN if self._currents else IMAGE}

    def signal(self, x: Any) -> Signal:
        """Range and origin of a tensor.

        Args:
            x: Any tensor.
        """
        return self._signals.get(_key(x), UNKNOWN) if isinstance(x, Tensor) else UNKNOWN

    def note(self, x: Tensor, signal: Signal) -> None:
        """Set the range and origin of a tensor.

        Args:
            x: The output of a layer.
            signal: Its range and origin.
        """
        self._signals[_key(x)] = signal

    def follow(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        known = [self._signals[key] for key in map(_key, inputs) if key in self._signals]
        if not known:
            return
        signal = Signal.joined(known, added=name in _ADDITIONS)
        if name in _SUMS and outputs and outputs[0].numel():
            signal = signal.times(max(1.0, inputs[0].numel() / outputs[0].numel()))
        for x in outputs:
            self._signals[_key(x)] = signal


def _key(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())
