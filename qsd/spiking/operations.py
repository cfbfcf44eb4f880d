"""The torch operations that a spike-driven network may consist of.

The list is short on purpose: operations that are linear in the values computed from the images, operations that only
rearrange them, and operations that pass spikes on as they are. Whatever is not listed is named by the audit, however
the values look: a softmax of zeros and ones is no synaptic operation, though its input is binary.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qsd.spiking.layers import Role

Kind = Literal["convolution", "linear", "product", "pool", "reduction", "shift", "other"]

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
# New tensors that take only their shape and type from an activation.
_FACTORIES = {
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_empty_strided", "zero", "fill", "is_same_size",
}  # fmt: skip
# Linear in the activations, or a mere rearrangement: neither a product of two activations nor a nonlinearity.
_LINEAR = {
    "add", "sub", "rsub", "neg", "cat", "stack", "clone", "expand", "permute", "t", "transpose", "numpy_T", "slice",
    "select", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "unsqueeze", "squeeze", "view",
    "_unsafe_view", "_reshape_alias", "reshape", "flatten", "alias", "detach", "lift_fresh", "repeat", "unbind",
    "split", "split_with_sizes", "chunk", "as_strided", "diagonal", "roll", "flip", "contiguous", "narrow", "unfold",
    "movedim", "upsample_nearest2d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col", "col2im",
    "unsafe_split", "unsafe_chunk", "slice_scatter", "select_scatter", "tril", "triu", "fill",
}  # fmt: skip
# Linear as well, as long as what selects is fixed: positions of the operands that may hold activations.
_SELECTIONS = {
    "index": {0}, "index_select": {0}, "gather": {0}, "take": {0}, "masked_select": {0}, "embedding": {0},
    "where": {1, 2}, "masked_fill": {0, 2}, "masked_scatter": {0, 2}, "index_put": {0, 2}, "scatter": {0, 3},
    "scatter_add": {0, 3}, "index_add": {0, 3}, "index_copy": {0, 3}, "roi_align": {0},
}  # fmt: skip
_COMPARISONS = {"gt", "ge", "lt", "le", "eq", "ne"}
_CASTS = {"_to_copy", "copy"}
_WIDEST = 32  # bits of an integer; sums of spike counts have about 20


class Call(NamedTuple):
    """One call of a torch operation, after it ran.

    Attributes:
        name: The operation's name, without the underscore of its form in place.
        overload: The name of its overload, such as ``"dtype"`` for a view of the same bytes as another type.
        arguments: Its positional arguments.
        options: Its keyword arguments.
        output: Its result.
        is_activation: Whether a tensor was computed from the images.
        role: Role of the layer of the engine around it, or ``None``.
    """

    name: str
    overload: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    output: Any
    is_activation: Callable[[Tensor], bool]
    role: Role | None

    def activations(self, value: Any) -> list[Tensor]:
        """The activations in an argument, which may be a list.

        Args:
            value: Any argument, or all of them.
        """
        return [x for x in tensors_in((value,)) if self.is_activation(x)]


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments or results of a torch operation, which may be lists.

    Args:
        values: The arguments; torch nests them in lists and tuples alone.
    """
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


class Recognized(NamedTuple):
    """The meaning of a call.

    Attributes:
        kind: See `qsd.spiking.watch.Operation`; ``None`` for an operation that is linear or passes spikes on.
        operands: The activations that decide whether it is spike-driven; two for a product.
        note: Reason why an operation of kind ``"other"`` is not spike-driven.
    """

    kind: Kind | None
    operands: tuple[Tensor, ...] = ()
    note: str = ""


_PASSES = Recognized(None)


def is_factory(call: Call) -> bool:
    """Whether a call makes a tensor whose values do not depend on activations.

    Args:
        call: The call.
    """
    return call.name in _FACTORIES and not call.activations((call.arguments[1:], *call.options.values()))


def recognize(call: Call) -> Recognized:
    """The kind of a call that has an activation among its arguments.

    Args:
        call: The call.
    """
    active = call.activations((call.arguments, *call.options.values()))
    if any(x.layout != torch.strided for x in active):
        return _other(call, f"{call.name} of sparse tensors, whose values are not followed")
    found = _recognize(call)
    note = _narrowing(call, active) if found.kind in (None, "reduction") else ""
    return _other(call, note) if note else found


def _recognize(call: Call) -> Recognized:
    name, arguments = call.name, call.arguments
    if name in _CONVOLUTIONS:
        return _weighted(call, "convolution", (arguments[0], arguments[1]))
    if name in _MATMULS:
        first, second = _MATMULS[name]
        return _weighted(call, "linear", (arguments[first], arguments[second]))
    if name in ("mul", "div"):
        return _scaling(call)
    if name.startswith("max_pool"):
        return _maximum(call)
    if name in _SELECTIONS:
        allowed = _SELECTIONS[name]
        fixed = [argument for i, argument in enumerate(arguments) if i not in allowed]
        if call.activations((fixed, *call.options.values())):
            return _other(call, f"{name} selects by values that were computed from the images")
    if call.options.get("reduce") not in (None, "add"):
        return _other(call, f"{name} multiplies the values that meet")
    if name in _REDUCTIONS:
        return Recognized("reduction", (call.activations(arguments)[0],))
    if name in _CASTS:
        return _cast(call)
    if name in _COMPARISONS:
        return _comparison(call)
    if name == "view" and call.overload == "dtype":
        return _other(call, "view reads the bits of its input as another type")
    return _PASSES if name in _LINEAR or name in _SELECTIONS else _other(call)


def _other(call: Call, note: str = "") -> Recognized:
    operands = tuple(call.activations((call.arguments, *call.options.values())))
    if not note:
        spikes = all(is_binary(x) for x in operands)
        note = f"{call.name} is neither linear nor a neuron" if spikes else f"{call.name} of values that are no spikes"
    return Recognized("other", operands, note)


def _weighted(call: Call, kind: Kind, operands: tuple[Tensor, Tensor]) -> Recognized:
    if call.role == "product":
        return Recognized("product", operands)  # Running sums that are still empty are no weights.
    active = tuple(call.activations(operands))
    if not active:
        return _PASSES  # Only the summand is an activation.
    return Recognized(kind if len(active) == 1 else "product", active)


def _scaling(call: Call) -> Recognized:
    if call.options.get("rounding_mode") is not None:
        return _other(call, "div rounds its result")
    both = [x for x in call.arguments[:2] if isinstance(x, Tensor)]
    active = call.activations(both)
    if len(both) < 2 or (both[1].dim() == 0 and len(active) == 1 and active[0] is both[0]):
        return Recognized("shift", (active[0],)) if _places(call) else _PASSES  # By a number.
    if call.name == "div" and any(x is both[1] for x in active):
        return _other(call, "div divides by values that were computed from the images")
    return _weighted(call, "linear", (both[0], both[1]))


def _places(call: Call) -> bool:
    """Whether a layer that sees spikes multiplies currents by 2, 4, 8, ..., which shifts their binary digits."""
    return call.name == "mul" and call.role in ("synapse", "product") and shifted_places(call.arguments[1]) is not None


def shifted_places(factor: Any) -> int | None:
    """The binary places by which a factor shifts, ``None`` if it is no power of two above 1.

    Args:
        factor: A number, or a tensor of one value.
    """
    mantissa, exponent = math.frexp(float(factor))
    return exponent - 1 if mantissa == 0.5 and exponent > 1 else None


def _maximum(call: Call) -> Recognized:
    active = call.activations(call.arguments)
    if call.role == "pool":
        return Recognized("pool", (active[0],))
    if set(tree_leaves(call.arguments[1])) == {1}:
        return _PASSES  # Of one pixel each: every n-th pixel is taken, as by a slice.
    return _other(call)


def _cast(call: Call) -> Recognized:
    """A change of type may round: it passes if the values come through unchanged."""
    source = call.arguments[1] if call.name == "copy" else call.arguments[0]
    result = call.arguments[0] if call.name == "copy" else call.output
    if result.dtype == source.dtype or torch.equal(result.to(source.dtype), source.expand_as(result)):
        return _PASSES
    return _other(call, f"a change of type to {result.dtype} rounds".replace("torch.", ""))


def _narrowing(call: Call, active: list[Tensor]) -> str:
    """The note on an operation whose result has a type that cannot hold its input, else an empty text.

    A sum of fractions as whole numbers rounds, and so does a slice that is set to fractions. Comparisons and changes of
    type are judged by their values.
    """
    results = tensors_in((call.output,))
    if not results or call.name in _CASTS or call.name in _COMPARISONS:
        return ""
    dtype = results[0].dtype
    for x in active:
        if torch.promote_types(dtype, x.dtype) != dtype and not torch.equal(x.to(dtype).to(x.dtype), x):
            return f"{call.name} with a result of type {dtype} rounds".replace("torch.", "")
    return ""


def _comparison(call: Call) -> Recognized:
    """A comparison of spikes with a number that gives the same spikes, or the absence of each, passes them on."""
    x = call.arguments[0]
    by_number = not call.activations((call.arguments[1:], *call.options.values()))
    if by_number and isinstance(x, Tensor) and is_binary(x):
        spikes = x != 0
        if torch.equal(call.output, spikes) or torch.equal(call.output, ~spikes):
            return _PASSES
    return _other(call, f"{call.name} compares values that are no spikes")


def is_binary(x: Tensor) -> bool:
    """Whether a tensor holds only 0 and 1.

    Args:
        x: Any tensor.
    """
    return bool(((x == 0) | (x == 1)).all())


def integer_bits(x: Tensor) -> int | None:
    """Bits of the widest integer in a tensor (with one for the sign where it is needed), ``None`` for other values.

    A float beyond 32 bits is no integer that anything was counted to: every fraction becomes one by a large factor.

    Args:
        x: Any tensor.
    """
    if x.is_complex() or (x.is_floating_point() and not bool((x == torch.round(x)).all())):
        return None
    low, high = int(x.min()), int(x.max())
    bits = max(high.bit_length(), (-low).bit_length()) + (low < 0)
    return bits if bits <= _WIDEST else None
