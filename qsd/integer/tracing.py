"""The data flow of a converted network in the count domain: its layers, and the operations of PyTorch between them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qsd.errors import QsdError
from qsd.spiking import SpikingNetwork
from qsd.spiking.layers import TimedLayer

_BATCH = 2  # A batch of one image could be taken for a constant of the model.
_SAME = ("detach", "alias", "lift_fresh", "clone", "contiguous", "_to_copy")


@dataclass(frozen=True)
class Call:
    """A layer that runs, or an operation of PyTorch between layers.

    Attributes:
        name: Name of the layer, or of the operation.
        inputs: Numbers of the values that it takes.
        output: Number of the value that it gives.
        shape: Shape of that value for one image.
        layer: The layer, ``None`` for an operation.
        arguments: The further arguments: of a layer after its first, of an operation all.
    """

    name: str
    inputs: tuple[int, ...]
    output: int
    shape: tuple[int, ...]
    layer: Any
    arguments: tuple[Any, ...]


@dataclass
class Flow:
    """The calls of one pass in the order of execution. Value 0 is the image.

    Attributes:
        image: Shape of the image.
        calls: The calls.
        output: Number of the value that the network returns.
    """

    image: tuple[int, ...]
    calls: list[Call] = field(default_factory=list)
    output: int = 0

    def producer(self, value: int) -> Call | None:
        """The call that gives a value, ``None`` for the image.

        Args:
            value: Number of the value.
        """
        return next((call for call in self.calls if call.output == value), None)

    def users(self, value: int) -> list[Call]:
        """The calls that take a value.

        Args:
            value: Number of the value.
        """
        return [call for call in self.calls if value in call.inputs]


@torch.no_grad()
def trace(spiking: SpikingNetwork, image: Tensor) -> Flow:
    """Run a network in the count domain and note what happens between and in front of its layers.

    Args:
        spiking: The network.
        image: An image ``[1, C, H, W]``.

    Raises:
        QsdError: If a layer runs several times in a pass, or if the network returns something else than one tensor.
    """
    images = image.expand(_BATCH, *image.shape[1:]).clone()
    recorder = _Recorder(images)
    with recorder.on(spiking.network), spiking.runtime.running("count"):
        output = spiking.network(images)
    if not isinstance(output, Tensor) or recorder.number(output) is None:
        raise QsdError("only classifiers, which return one tensor, become integer networks.")
    recorder.flow.output = recorder.number(output) or 0
    return recorder.flow


class _Recorder(TorchDispatchMode):
    """Gives every tensor that is computed from the images a number.

    Args:
        images: The images.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.flow = Flow(tuple(images.shape[1:]))
        # The tensors are held, so that no other gets the address of one of them.
        self._numbers: dict[int, tuple[int, Tensor]] = {id(images): (0, images)}
        self._depth = 0
        self._seen: set[nn.Module] = set()

    @contextmanager
    def on(self, network: nn.Module) -> Iterator[None]:
        """Record a run of a network.

        Args:
            network: The converted modules.
        """
        layers = [module for module in network.modules() if isinstance(module, TimedLayer)]
        handles = [layer.register_forward_pre_hook(self._enter) for layer in layers]
        handles += [layer.register_forward_hook(self._leave, always_call=True) for layer in layers]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def number(self, value: Any) -> int | None:
        """The number of a value, ``None`` for one that is not computed from the images.

        Args:
            value: An argument of an operation.
        """
        return self._numbers[id(value)][0] if id(value) in self._numbers else None

    def _enter(self, *_: Any) -> None:
        self._depth += 1

    def _leave(self, layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1
        if self._depth or output is None:
            return
        if layer in self._seen:
            raise QsdError(
                f"layer {layer.name} runs several times in a pass, and an integer network has each layer once; use "
                "one layer for each call."
            )
        self._seen.add(layer)
        self._note(layer.name, inputs, output, layer)

    def _note(self, name: str, inputs: tuple[Any, ...], output: Tensor, layer: Any = None) -> None:
        numbers = tuple(n for n in map(self.number, inputs) if n is not None)
        rest = tuple(x for x in inputs if self.number(x) is None)
        shape = tuple(output.shape[1:])
        if output.shape[:1] != (_BATCH,):
            raise QsdError(f"operation {name} mixes the images of a batch, which an integer network cannot do.")
        made = len(self.flow.calls) + 1
        self._numbers[id(output)] = made, output
        self.flow.calls.append(Call(name, numbers, made, shape, layer, rest))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._depth:
            return output
        inputs = tuple(tree_leaves((args, kwargs or {})))
        numbers = [n for n in map(self.number, inputs) if n is not None]
        if not numbers:
            return output
        name = func.overloadpacket.__name__
        if name in _SAME and isinstance(output, Tensor):
            self._numbers[id(output)] = numbers[0], output
        elif isinstance(output, Tensor):
            self._note(name, tuple(args) + tuple((kwargs or {}).values()), output)
        else:
            raise QsdError(f"operation {name} between layers has no integers; build the model from layers of qsd.")
        return output
