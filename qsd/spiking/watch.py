"""Activations followed through every torch operation of a network, whatever module computes it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qsd.spiking.layers import Role, TimedLayer
from qsd.spiking.network import SpikingNetwork
from qsd.spiking.signals import plain

Kind = Literal["convolution", "linear", "product", "pool", "reduction", "other"]

# Positions of the two operands of operations that multiply and sum.
_MATMULS = {
    "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1), "matmul": (0, 1), "linear": (0, 1), "addmm": (1, 2),
    "baddbmm": (1, 2), "addbmm": (1, 2), "addmv": (1, 2), "addr": (1, 2), "outer": (0, 1),
}  # fmt: skip
_CONVOLUTIONS = {"convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution"}
_REDUCTIONS = {
    "mean", "sum", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "upsample_bilinear2d",
    "_upsample_bilinear2d_aa", "upsample_bicubic2d", "roi_align", "cumsum",
}  # fmt: skip
# Linear in the activations, or a mere rearrangement: neither a product of two activations nor a nonlinearity.
_LINEAR = {
    "add", "sub", "rsub", "neg", "cat", "stack", "copy", "clone", "_to_copy", "expand", "permute", "t", "transpose",
    "numpy_T", "slice", "select", "index", "index_select", "gather", "constant_pad_nd", "reflection_pad2d",
    "replication_pad2d", "unsqueeze", "squeeze", "view", "_unsafe_view", "_reshape_alias", "reshape", "flatten",
    "alias", "detach", "lift_fresh", "repeat", "unbind", "split", "split_with_sizes", "chunk", "as_strided",
    "diagonal", "roll", "flip", "contiguous", "narrow", "unfold", "movedim", "upsample_nearest2d", "pixel_shuffle",
    "pixel_unshuffle", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros",
    "new_ones", "new_full", "new_empty", "new_empty_strided", "zero", "fill", "is_same_size", "channel_shuffle",
    "im2col", "col2im", "unsafe_split", "unsafe_chunk", "slice_scatter", "select_scatter", "tril", "triu",
}  # fmt: skip
_FACTORIES = {name for name in _LINEAR if name.endswith("_like") or name.startswith("new_") or name in ("zero", "fill")}


@dataclass
class Operation:
    """One torch operation on values that were computed from the images.

    Attributes:
        kind: With weights (convolution, linear), of two activations (product), a maximum in a layer of role ``"pool"``
            (pool), a weighted or plain sum over positions (reduction), or a nonlinearity or comparison (other).
        torch_name: The operation's name in torch.
        name: A layer's dotted name in the trained model, or the path of the module that computes it.
        layer: The innermost layer of the engine around it, or ``None``.
        activations: One input; two for a product.
        image: Whether its input was computed from images alone, without a synapse.
        arguments: The operation's arguments.
        output: The operation's output.
    """

    kind: Kind
    torch_name: str
    name: str
    layer: TimedLayer | None
    activations: tuple[Tensor, ...]
    image: bool
    arguments: tuple[Any, ...]
    output: Any


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

    @contextmanager
    def on(self, images: Tensor) -> Iterator[None]:
        """Watch a run of the network on these images.

        Args:
            images: ``[B, C, H, W]``.
        """
        # Weak references keep a storage's address from being used again, so old ones can do no harm but take room.
        self._activations = {_storage(images)}
        self._images = set() if self._currents else {_storage(images)}  # currents are another network's work
        handles = []
        for module in self._paths:
            handles.append(module.register_forward_pre_hook(lambda m, _: self._stack.append(m)))
            handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            with self:
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
        return _storage(x) in self._images

    def _leave(self) -> None:
        self._stack.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        activations = [x for x in inputs if _storage(x) in self._activations]
        name = func.overloadpacket.__name__
        name = name if name.startswith("__") else name.removesuffix("_")
        if not activations or name in _FACTORIES:
            return output
        image = all(self.is_image(x) for x in activations)
        kind, operands = self._kind(name, args, activations)
        passed = image and kind in ("pool", "reduction", "other")
        if kind is not None and self._stack and self._role() != "neuron" and not passed:
            operands = tuple(plain(x) for x in operands)
            self.report(Operation(kind, name, *self._place(), operands, image, args, output))
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                self._activations.add(_storage(x))
                if image and kind in (None, "pool", "reduction", "other"):
                    self._images.add(_storage(x))
        return output

    def _kind(self, name: str, args: tuple[Any, ...], activations: list[Tensor]) -> tuple[Kind | None, tuple[Any, ...]]:
        if name in _CONVOLUTIONS:
            return self._weighted("convolution", (args[0], args[1]))
        if name in _MATMULS:
            first, second = _MATMULS[name]
            return self._weighted("linear", (args[first], args[second]))
        if name in ("mul", "div"):
            both = [x for x in args[:2] if isinstance(x, Tensor)]
            if len(both) < 2 or (both[1].dim() == 0 and len(activations) == 1 and activations[0] is both[0]):
                return None, ()  # by a number
            if name == "div" and any(x is both[1] for x in activations):
                return "other", (both[1],)
            return self._weighted("linear", (both[0], both[1]))
        if name == "where":
            bent = any(args[0] is x for x in activations)
            return ("other", (args[0],)) if bent else (None, ())
        if name in _REDUCTIONS:
            return "reduction", (activations[0],)
        if name.startswith("max_pool") and self._role() == "pool":
            return "pool", (activations[0],)
        if name.startswith("max_pool") and set(tree_leaves(args[1])) == {1}:
            return None, ()  # of one pixel each: every so many pixels are taken, as by a slice
        return (None, ()) if name in _LINEAR else ("other", tuple(activations))

    def _weighted(self, kind: Kind, operands: tuple[Tensor, Tensor]) -> tuple[Kind | None, tuple[Tensor, ...]]:
        if self._role() == "product":
            return "product", operands  # running sums of nothing yet are no weights
        active = tuple(x for x in operands if _storage(x) in self._activations)
        return (kind if len(active) == 1 else "product" if active else None), active

    def _layer(self) -> TimedLayer | None:
        """The innermost layer of the engine."""
        return next((module for module in reversed(self._stack) if isinstance(module, TimedLayer)), None)

    def _role(self) -> Role | None:
        layer = self._layer()
        return None if layer is None else layer.role

    def _place(self) -> tuple[str, TimedLayer | None]:
        layer, inner = self._layer(), self._stack[-1]
        return (self._paths[inner] or "the model", None) if layer is None else (layer.part_name(inner), layer)


def _storage(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


def is_binary(x: Tensor) -> bool:
    """Whether a tensor holds only 0 and 1.

    Args:
        x: any tensor.
    """
    return bool(((x == 0) | (x == 1)).all())


def integer_bits(x: Tensor) -> int | None:
    """Bits of the widest integer in a tensor (with one for the sign where it is needed), ``None`` for fractions.

    Args:
        x: any tensor.
    """
    if x.is_floating_point() and not bool((x == torch.round(x)).all()):
        return None
    low, high = int(x.min()), int(x.max())
    return max(high.bit_length(), (-low).bit_length()) + (low < 0)
