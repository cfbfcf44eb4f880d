"""Registers of writers: how each type of converted layer is written into one kind of graph.

As conversion rules are registered by the type of a trained layer, writers are registered by the type of a converted
layer. A writer counts for its type alone and not for subclasses: a subclass computes something else, and would else be
written as the layer that it is derived from, without a word.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from qsd.errors import QsdError
from qsd.spiking.layers import TimedLayer

# A writer gets the layer, its node in the traced graph, and the graph that it adds to. The types of the last two, and
# of the result, belong to the kind of graph.
Writer = Callable[[Any, Any, Any], Any]
_W = TypeVar("_W", bound=Writer)


class Writers:
    """The writers of one kind of graph, by the type of layer. An object is the decorator that registers a writer.

    Args:
        target: The kind of graph, for error messages.
        decorator: Path under which users import the object, for error messages.
        otherwise: Another way for a network with a layer that has no writer, for error messages.
    """

    def __init__(self, target: str, decorator: str, otherwise: str) -> None:
        self.target, self.decorator, self.otherwise = target, decorator, otherwise
        self._writers: dict[type[nn.Module], Writer] = {}
        self._left_to_torch: set[type[nn.Module]] = set()

    def __call__(self, *types: type[TimedLayer]) -> Callable[[_W], _W]:
        """Decorator: write layers of exactly these types by the function.

        Args:
            types: Types of converted layers.
        """

        def register(writer: _W) -> _W:
            self._writers.update(dict.fromkeys(types, writer))
            return writer

        return register

    def leave_to_torch(self, *types: type[TimedLayer]) -> None:
        """Let PyTorch's exporter write layers of exactly these types, as the operations of their count domain.

        Args:
            types: Types of converted layers.
        """
        self._left_to_torch.update(types)

    def has_writer(self, module: nn.Module) -> bool:
        """Whether a module has a writer.

        Args:
            module: Any module.
        """
        return type(module) in self._writers

    def of(self, layer: nn.Module) -> Writer:
        """The writer of a layer.

        Args:
            layer: A layer with a writer.
        """
        return self._writers[type(layer)]

    def check(self, network: nn.Module) -> None:
        """Refuse a network with a layer that has no writer.

        Args:
            network: A converted network.

        Raises:
            QsdError: Naming the first such layer and the decorator that registers a writer.
        """
        for layer in network.modules():
            known = self.has_writer(layer) or type(layer) in self._left_to_torch
            if isinstance(layer, TimedLayer) and not known:
                kind = type(layer).__name__
                raise QsdError(
                    f"layer {layer.name} ({kind}) has no writer for {self.target}; register one with "
                    f"@{self.decorator}({kind}), or {self.otherwise}."
                )
