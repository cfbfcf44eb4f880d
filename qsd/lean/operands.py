"""The record of where tensors come from, and how an operand is kept for the backward pass.

A neuron notes the codes of its output, a batch norm its input; a layer that receives the tensor, or any view of it,
finds the note by the tensor's storage. A note is never believed: before a float tensor is dropped, its values are
compared bit by bit with those that follow from the note. So whatever happens to a tensor between two layers (a change
in place or through ``.data``, a copy, another learned step), gradients are those of the values that the layer computed
with. A tensor that differs from its note is kept as it is.

Where kernels compute, on a CUDA device, a processor that waits for each comparison leaves the device idle. There a
tensor that PyTorch knows of no change of is compared, too, but the results are read all at once in the backward pass.
A difference, which only a change behind PyTorch's back (``.data``) can make, is an error then.
"""

import threading
from typing import ClassVar, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses import FakeTensor

from qsd.errors import QsdError
from qsd.kernels import switch
from qsd.lean.codes import Layout
from qsd.lean.memory import images_of_block, same_bits_


class Codes(NamedTuple):
    """The codes of a tensor of counts times the amplitude, which is dense and alone in its storage.

    Attributes:
        layout: Layout of the codes.
        packed: Codes, uint8.
        version: PyTorch's number of changes of the tensor when the codes were noted.
    """

    layout: Layout
    packed: Tensor
    version: int


class NormOrigin(NamedTuple):
    """The tensors that a batch norm computed its output from; the norm keeps them anyway.

    Attributes:
        x: Input of the norm ``[B, C, H, W]``.
        weight: ``[C]``.
        bias: ``[C]``.
        mean: Mean of the batch ``[C]``.
        inverse: Inverse standard deviation of the batch ``[C]``.
        eps: Of the norm.
        var: Variance of the batch ``[C]`` where processes share the statistics, else ``None``.
        versions: PyTorch's numbers of changes of input, weight, bias and output when the origin was noted.
        call: Stands for this call of the norm in `GRADIENTS`.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    inverse: Tensor
    eps: float
    var: Tensor | None
    versions: tuple[int, ...]
    call: object


class NormGradients(NamedTuple):
    """The gradients of a batch norm, computed by the neuron behind it, which needs the same sums over the batch.

    They hold if the gradient that the neuron returns reaches the norm as it is: not joined with that of another layer,
    and not replaced or changed by a hook.

    Attributes:
        call: The call of the norm.
        version: PyTorch's number of changes of the gradient of the norm's output.
        gradients: Gradients of input (``None`` if it needs none), weight and bias.
    """

    call: object
    version: int
    gradients: tuple[Tensor | None, Tensor, Tensor]


# The notes, by storage; neurons, pools and norms write them. A storage is one Python object as long as its memory is
# alive; views and detached tensors share it.
CODES: WeakKeyDictionary[UntypedStorage, Codes] = WeakKeyDictionary()
NORMS: WeakKeyDictionary[UntypedStorage, NormOrigin] = WeakKeyDictionary()
# Those of the backward pass, by the storage of the gradient that a neuron hands to the norm in front of it.
GRADIENTS: WeakKeyDictionary[UntypedStorage, NormGradients] = WeakKeyDictionary()


class _Comparison:
    """The comparison of a tensor with its codes, made on a device and not read yet.

    Args:
        differs: The result, int32 ``[1]``: not 0 if there is a difference.
    """

    _lock = threading.Lock()
    _unread: ClassVar[WeakSet["_Comparison"]] = WeakSet()

    def __init__(self, differs: Tensor) -> None:
        self.differs = differs
        self.equal: bool | None = None
        with self._lock:
            self._unread.add(self)

    def confirm(self) -> None:
        """Read the results of all comparisons on this device, if this one was not read.

        Raises:
            QsdError: If the tensor differs from its codes.
        """
        with self._lock:  # the gradients of several devices are computed by several threads
            if self.equal is None:
                together = [c for c in self._unread if c.differs.device == self.differs.device]
                for comparison, number in zip(together, torch.cat([c.differs for c in together]).tolist()):
                    comparison.equal = number == 0
                self._unread.difference_update(together)
        if not self.equal:
            raise QsdError(
                "spikes were changed behind PyTorch's back (through .data, say) between a neuron and the layer behind "
                "it, and memory-lean training on a CUDA device has dropped them; switch it off: qsd.set_lean(model, "
                "False)."
            )


class SavedOperand(NamedTuple):
    """How a saved tensor becomes an operand again.

    Attributes:
        layout: Layout of its codes; ``None`` if the operand was saved as it is.
        dtype: Type of the operand.
        shape: Shape of the operand.
        stride: Strides of the operand.
        offset: Offset of the operand in its storage.
        comparison: The comparison with the codes, if it was not waited for.
    """

    layout: Layout | None
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    comparison: _Comparison | None = None

    def restore(self, saved: Tensor) -> Tensor:
        """The operand, bit by bit.

        Args:
            saved: The tensor that `save_operand` returned.

        Raises:
            QsdError: If the operand has other values than its codes, which is known only now on a CUDA device.
        """
        if self.layout is None:
            return saved
        if self.comparison is not None:
            self.comparison.confirm()
        values = self.layout.values(saved, self.dtype)
        return values.as_strided(self.shape, self.stride, self.offset)


def save_operand(x: Tensor) -> tuple[SavedOperand, Tensor]:
    """Decide how a function keeps an operand.

    Args:
        x: The operand that the function computes with.

    Returns:
        The description, and the tensor to save: codes if the operand has exactly their values, else ``x``.
    """
    codes = CODES.get(x.untyped_storage())
    if codes is not None:
        layout, packed, version = codes
        differs = layout.difference(packed, x) if switch.devices and x._version == version else None
        comparison = None if differs is None else _Comparison(differs)
        if comparison is not None or layout.matches(packed, x):
            place = x.shape, x.stride(), int(x.storage_offset())
            return SavedOperand(layout, x.dtype, *place, comparison), packed
    return SavedOperand(None, x.dtype, x.shape, (), 0), x


def layout_of(x: Tensor) -> Layout | None:
    """The layout of a tensor's codes if some were noted; the tensor may have been changed since.

    Args:
        x: Any tensor.
    """
    codes = CODES.get(x.untyped_storage())
    return None if codes is None else codes.layout


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, whose codes are those of ``x``.

    Args:
        x: Any tensor.
        dtype: Floating-point type.
    """
    if x.dtype == dtype:
        return x
    result = x.to(dtype)
    codes = None if torch.compiler.is_compiling() else CODES.get(x.untyped_storage())
    if codes is not None and result.stride() == x.stride() and result.numel() == codes.layout.numel:
        CODES[result.untyped_storage()] = codes._replace(version=result._version)
    return result


def norm_origin(x: Tensor) -> NormOrigin | None:
    """The batch norm that a tensor is the output of, if computing it again gives the same bits.

    Args:
        x: Any tensor.
    """
    origin = NORMS.get(x.untyped_storage())
    if origin is None or x.shape != origin.x.shape or x.dtype != origin.x.dtype:
        return None
    if x.is_meta or isinstance(x, FakeTensor):  # shapes without values, to count bytes
        return origin
    return origin if _gives(origin, x) else None


def _gives(origin: NormOrigin, output: Tensor) -> bool:
    """Whether a batch norm of the same tensors gives an output again, bit by bit; on CUDA devices by their versions."""
    x, weight, bias, mean, inverse, eps, var, versions, _ = origin
    if x.stride() != output.stride():
        return False
    if x.is_cuda:  # Computing the norm again and waiting for it would cost more than the norm: PyTorch's word is taken.
        return versions == tuple(t._version for t in (x, weight, bias, output))
    if var is not None:
        return torch.equal(torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0], output)
    if not x.is_cpu:
        return torch.equal(torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)[0], output)
    # On a processor the statistics take most of the time. A norm in evaluation with variance 1 and epsilon 0 has the
    # last pass alone, and the same rounding if its bias is computed with a fused multiplication and addition.
    scale = inverse * weight
    shift = torch.addcmul(bias, mean, scale, value=-1)
    zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
    images = images_of_block(x)
    for part, expected in reversed([*zip(x.split(images), output.split(images))]):  # the end is there still
        again = torch.native_batch_norm(part, scale, shift, zeros, ones, False, 0.0, 0.0)[0]
        if not same_bits_(again, expected):
            return False
    return True
