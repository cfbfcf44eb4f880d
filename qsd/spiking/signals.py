"""Marked tensors: signals that know their source and the time step at which they begin.

Between the layers of a converted network lies ordinary Python: residual sums, reshapes, a flattening in front of the
head. The engine does not need to know that code, because the tensors that run through it carry three marks:

- ``source``, the neuron whose spikes the tensor holds. A rearrangement (`MarkedTensor.REARRANGEMENTS`) keeps it. Any
  other operation makes a current of the spikes, which has no source. That is how a synapse learns which neuron's
  amplitude belongs into its weights, and how the engine finds neurons whose spikes meet an operation that is no
  layer, such as a functional ReLU: those neurons are told to multiply their spikes by the amplitude themselves.
- ``IMAGE`` as the source of whatever was computed from images alone. An image is the same in every time step and has no
  time axis.
- ``arrival``, the offset of the signal's window on a global clock. Where signals of different arrival meet, the earlier
  one waits: a residual connection waits for its branch.

Marks are set by the layers of the engine and passed on by PyTorch's ``__torch_function__`` protocol. The count domain
runs without them.
"""

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from qsd.errors import QsdError

if TYPE_CHECKING:
    from qsd.spiking.runtime import Runtime


class Source(Enum):
    """Sources of signals that are no neurons; copies and pickles hold the same objects."""

    IMAGE = "image"


# The source of a tensor that is an image, or computed from nothing else.
IMAGE = Source.IMAGE


class MarkedTensor(torch.Tensor):
    """A tensor with marks, see the module.

    Attributes:
        source: The neuron whose spikes the tensor holds, perhaps rearranged; `IMAGE` for a function of images alone;
            ``None`` for a current.
        arrival: Time step at which the window of the signal begins.
        runtime: Runtime of the network.
    """

    source: Any
    arrival: int
    runtime: "Runtime"

    # Names of functions, as `__torch_function__` gets them, that change no value. Reading a property such as ``.T`` or
    # ``.shape`` arrives here as ``__get__``.
    REARRANGEMENTS = frozenset(
        {
            "reshape", "view", "flatten", "permute", "transpose", "contiguous", "unsqueeze", "squeeze", "__getitem__",
            "clone", "detach", "unflatten", "movedim", "dropout", "to", "double", "float", "__get__", "as_subclass",
            "pixel_shuffle",
        }
    )  # fmt: skip

    @classmethod
    def mark(cls, x: Tensor, source: Any, arrival: int, runtime: "Runtime") -> "MarkedTensor":
        """Give a tensor its marks.

        Args:
            x: Any tensor.
            source: Source of its values.
            arrival: Time step at which its window begins.
            runtime: Runtime of the network.
        """
        marked = x.as_subclass(cls)
        marked.source, marked.arrival, marked.runtime = source, arrival, runtime
        return marked

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves, structure = tree_flatten((args, kwargs or {}))
        marked = [x for x in leaves if is_marked(x)]
        if not marked:
            return super().__torch_function__(func, types, args, kwargs or {})
        runtime = marked[0].runtime
        aligned, arrival = runtime.aligned(tuple(leaves))
        args, kwargs = tree_unflatten(aligned, structure)
        try:
            result = super().__torch_function__(func, types, args, kwargs)
        except NotImplementedError as error:
            if "storage" not in str(error):
                raise
            raise QsdError(
                "the model computes with sparse tensors, which cannot be converted; use dense ones."
            ) from error
        results = [x for x in tree_leaves(result) if isinstance(x, MarkedTensor)]
        keeps = getattr(func, "__name__", "") in cls.REARRANGEMENTS
        image = all(x.source is IMAGE for x in marked)
        for x in results:
            x.source = marked[0].source if keeps else IMAGE if image else None
            x.arrival, x.runtime = arrival, runtime
        if results and not keeps and runtime.converting:
            for x in marked:
                if x.source is not None and x.source is not IMAGE:
                    x.source.scaled = True
        return result


def is_marked(x: Any) -> bool:
    """Whether an object is a tensor with marks.

    Args:
        x: Any object.
    """
    return isinstance(x, MarkedTensor) and hasattr(x, "source")


def plain(x: Any) -> Any:
    """A tensor without marks; any other object as it is.

    Args:
        x: Any object.
    """
    return x.as_subclass(Tensor) if isinstance(x, MarkedTensor) else x
