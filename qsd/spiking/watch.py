"""Following what is computed from images through every torch operation of a network, whatever module it is in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qsd.spiking.layers import (
    Convolution,
    DelayedNeuron,
    SpikingChain,
    SpikingMaxPool,
    SpikingProduct,
    SpikingQuery,
    TimedLayer,
)
from qsd.spiking.network import SpikingNetwork

Kind = Literal["convolution", "linear", "product", "pool", "reduction", "other"]

# Positions of the two operands of what multiplies and sums.
_MATMULS = {
    "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1), "matmul": (0, 1), "linear": (0, 1), "addmm": (1, 2),
    "baddbmm": (1, 2), "addbmm": (1, 2), "addmv": (1, 2), "addr": (1, 2), "outer": (0, 1),
}  # fmt: skip
_CONVOLUTIONS = {"convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution"}
_REDUCTIONS = {
    "mean", "sum", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "upsample_bilinear2d",
    "_upsample_bilinear2d_aa", "upsample_bicubic2d", "roi_align", "cumsum",
}  # fmt: skip
# Linear in the activations, or mere rearrangement: neither multiplies two of them nor bends one.
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
        kind: what it is: with weights (convolution, linear), of two activations (product), a maximum in a max-pool of
            ours (pool), a weighted or plain sum over positions (reduction), or what bends or compares (other).
        torch_name: the operation's name in torch.
        name: where it was: a layer's dotted name in the trained model, or a module's path.
        layer: innermost layer of ours that it is in, or ``None``.
        activations: one input; two for a product.
        image: it sees what was computed from images alone, without a synapse.
        arguments: as torch got them.
        output: of the operation.
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

    What is an activation is followed by storage: the images, and whatever an operation makes of one.

    Args:
        spiking: the network.
        report: called with every operation outside neurons.
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
            x: any tensor.
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
        outside = self._stack and not isinstance(self._stack[-1], DelayedNeuron)
        if kind is not None and outside and not (image and kind in ("pool", "reduction", "other")):
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
        if name.startswith("max_pool") and any(isinstance(module, SpikingMaxPool) for module in self._stack):
            return "pool", (activations[0],)
        if name.startswith("max_pool") and set(tree_leaves(args[1])) == {1}:
            return None, ()  # of one pixel each: every so many pixels are taken, as by a slice
        return (None, ()) if name in _LINEAR else ("other", tuple(activations))

    def _weighted(self, kind: Kind, operands: tuple[Tensor, Tensor]) -> tuple[Kind | None, tuple[Tensor, ...]]:
        if self._stack and isinstance(self._stack[-1], SpikingProduct | SpikingQuery):
            return "product", operands  # running sums of nothing yet are no weights
        active = tuple(x for x in operands if _storage(x) in self._activations)
        return (kind if len(active) == 1 else "product" if active else None), active

    def _place(self) -> tuple[str, TimedLayer | None]:
        layer = next((m for m in reversed(self._stack) if isinstance(m, TimedLayer)), None)
        if layer is None:
            return self._paths[self._stack[-1]] or "the model", None
        inner = self._stack[-1]
        if isinstance(layer, SpikingChain) and isinstance(inner, Convolution) and len(layer.convolutions) > 1:
            factor = next((key for key, c in layer.convolutions.items() if c is inner), None)
            return (layer.name if factor is None else f"{layer.name}.{factor}"), layer
        return layer.name, layer


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
