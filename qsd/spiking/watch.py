"""Activations followed through every torch operation of a network, whatever module computes it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qsd.spiking.layers import Role, TimedLayer
from qsd.spiking.network import SpikingNetwork
from qsd.spiking.operations import Call, Kind, is_factory, recognize, tensors_in
from qsd.spiking.signals import plain


@dataclass
class Operation:
    """One torch operation on values that were computed from the images.

    Attributes:
        kind: With weights (convolution, linear), of two activations (product), a maximum in a layer of role ``"pool"``
            (pool), a weighted or plain sum over positions (reduction), a multiplication of a layer's currents by a
            power of two (shift), or a nonlinearity or comparison (other).
        torch_name: The operation's name in torch.
        name: A layer's dotted name in the trained model, or the path of the module that computes it.
        layer: The innermost layer of the engine around it, or ``None``.
        activations: One input; two for a product.
        image: Whether its input was computed from images alone, without a synapse.
        arguments: The operation's arguments.
        output: The operation's output.
        note: Reason why an operation of kind ``"other"`` is not spike-driven.
    """

    kind: Kind
    torch_name: str
    name: str
    layer: TimedLayer | None
    activations: tuple[Tensor, ...]
    image: bool
    arguments: tuple[Any, ...]
    output: Any
    note: str = ""


# Functions that hand values to another library, and those that make a tensor of single values: no operation shows them.
_EXITS = frozenset({"numpy", "tolist", "__array__", "__dlpack__"})
_CONSTRUCTORS = frozenset({"tensor", "as_tensor", "asarray", "new_tensor"})


class _Exits(TorchFunctionMode):
    """Reports values that leave the operations of PyTorch.

    Args:
        report: Called with the function's name and the tensor.
    """

    def __init__(self, report: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.report = report

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        data: list[Any] = []
        if name in _EXITS:
            data = [args[0]]
        elif name in _CONSTRUCTORS:
            data = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, list | tuple)]
        for x in tensors_in(data):
            self.report(name, x)
        return func(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Reports operations on activations while a network runs under it.

    Activations are recognised by their storage: the images, and every result of an operation on an activation.

    Args:
        spiking: The network.
        report: Called with every operation outside of neurons.
    """

    def __init__(self, spiking: SpikingNetwork, report: Callable[[Operation], None]) -> None:
        super().__init__()
        self.report, self._currents = report, spiking.currents
        self._paths = {module: name for name, module in spiking.network.named_modules()}
        self._stack: list[nn.Module] = []
        self._images: set[StorageWeakRef] = set()
        self._activations: set[StorageWeakRef] = set()
        self._exits = _Exits(self._leaves_torch)
        self._entered = False
        self._thread = threading.get_ident()

    @contextmanager
    def on(self, images: Tensor) -> Iterator[None]:
        """Watch a run of the network on these images.

        Args:
            images: ``[B, C, H, W]``.
        """
        self._thread, self._entered = threading.get_ident(), False
        # A module may have kept a value of the run before. A weak reference keeps its storage's address from new use.
        self._activations = {x for x in self._activations if not x.expired()}
        self._images = {x for x in self._images if not x.expired()}
        self._activations.add(StorageWeakRef(images.untyped_storage()))
        if not self._currents:  # which are another network's work
            self._images.add(StorageWeakRef(images.untyped_storage()))
        handles = []
        for module in self._paths:
            handles.append(module.register_forward_pre_hook(self._enter))
            # Before the user's own hooks, whose operations do not belong to the module.
            handles.append(module.register_forward_hook(self._leave, prepend=True, always_call=True))
        try:
            with self, self._exits:
                yield
        finally:
            self._stack.clear()
            for handle in handles:
                handle.remove()

    def is_image(self, x: Tensor) -> bool:
        """Whether a tensor was computed from images alone, without a synapse.

        Args:
            x: Any tensor.
        """
        storage = _storage(x)
        return storage is not None and storage in self._images

    def is_watched(self) -> bool:
        """Whether this thread runs the network that is watched; hooks of modules are called by all threads."""
        return threading.get_ident() == self._thread

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self.is_watched():
            return
        self._stack.append(module)
        self._entered = True
        if not isinstance(module, TimedLayer) or module.runtime.mode == "trace":
            return  # A network is traced on images of its own.
        if not all(self._is_activation(x) for x in inputs if isinstance(x, Tensor)):
            # Nothing is known of such values: another library computed them, or they are constants.
            note = "its input was not computed from the images by torch"
            self.report(Operation("other", "input", *self._place(), (), False, inputs, None, note))

    def _is_activation(self, x: Tensor) -> bool:
        storage = _storage(x)
        return storage is None or storage in self._activations  # Of sparse tensors nothing is known.

    def _leaves_torch(self, name: str, x: Tensor) -> None:
        if self._is_activation(x) and not self.is_image(x) and self._role() != "neuron" and self.is_watched():
            note = f"{name} passes values on in a way that is not followed"
            self.report(Operation("other", name, *self._place(), (plain(x),), False, (x,), None, note))

    def _leave(self, *_: Any) -> None:
        if self.is_watched():
            self._stack.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        output = func(*args, **options)
        name = func.overloadpacket.__name__
        name = name if name.startswith("__") else name.removesuffix("_")
        inputs, outputs = tensors_in((*args, *options.values())), tensors_in((output,))
        activations = [x for x in inputs if self._is_activation(x)]
        call = Call(name, func._overloadname, args, options, output, self._is_activation, self._role())
        if activations and not is_factory(call):
            image = all(self.is_image(x) for x in activations)
            kind = self._report(call, image)
            storages = [storage for x in outputs if (storage := _storage(x)) is not None]
            self._activations.update(storages)
            if image and call.role != "neuron" and kind in (None, "pool", "reduction", "other"):
                self._images.update(storages)
        self.follow(name, inputs, outputs)
        return output

    def _report(self, call: Call, image: bool) -> Kind | None:
        """Report a call with activations if it is none of those that pass; its kind."""
        if call.role == "neuron" and not image:
            return None  # The operations of a neuron are its own.
        kind, operands, note = recognize(call)
        passed = call.role == "neuron" or (image and kind in ("pool", "reduction", "other"))
        # Around the network, images are checked before it runs, and its output is summed over the window.
        around = not self._stack and (kind == "reduction" or not self._entered)
        if kind is not None and not around and not passed:
            operands = tuple(plain(x) for x in operands)
            place = self._place()
            self.report(Operation(kind, call.name, *place, operands, image, call.arguments, call.output, note))
        return kind

    def follow(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Called after every operation, for what a subclass wants to know of its tensors.

        Args:
            name: The operation's name in torch.
            inputs: All tensors among its arguments.
            outputs: All tensors of its result.
        """

    def _layer(self) -> TimedLayer | None:
        """The innermost layer of the engine."""
        return next((module for module in reversed(self._stack) if isinstance(module, TimedLayer)), None)

    def _role(self) -> Role | None:
        layer = self._layer()
        return None if layer is None else layer.role

    def _place(self) -> tuple[str, TimedLayer | None]:
        layer = self._layer()
        if layer is not None:
            return layer.part_name(self._stack[-1]), layer
        return (self._paths[self._stack[-1]] if self._stack else "") or "the model", None


def _storage(x: Tensor) -> StorageWeakRef | None:
    """The storage of a tensor; sparse ones have none."""
    try:
        return StorageWeakRef(x.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None
