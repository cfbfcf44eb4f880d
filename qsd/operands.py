r"""Spike counts and weight codes as integer operands, whose sums are exact in every number format.

A neuron passes on ``count * amplitude``, and a quantized weight is ``code * step``. A layer can therefore add up the
integers ``count * code`` first and multiply by ``amplitude * step`` once. Counts are at most 255 and codes have at most
8 bits: bfloat16 (integers to 256), float16 and TF32 (to 2048) hold both exactly, and the product has at most 15 bits.

While :math:`K \cdot n \cdot c < 2^{24}`, for K inputs of an output, a largest count n and a largest absolute code c,
every partial sum, in every order of summation and in every split, is an integer that float32 holds. So sums in float32
of operands in any of these formats are the same integers.

Sums are exact only where the operands enter the multiplication as they are. Winograd's algorithm and the Fourier
transform replace them by other numbers, and cuDNN, which may choose either for a convolution, has no setting of PyTorch
that forbids them. On CUDA devices a convolution is therefore a product of matrices; cuBLAS multiplies the operands
themselves. PyTorch stores the result of convolutions of half precision in half precision; `torch.mm` can store it in
float32 on CUDA devices (from PyTorch 2.8). On processors the integers are summed in float32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, UntypedStorage

from qsd import functional
from qsd.functional import HALF_UP, CountRule
from qsd.rounding import HALF_TYPES

Scalar = float | Tensor

# All integers below it are numbers of float32.
EXACT_SUM = 2**24
# The largest integer up to which all integers are numbers of a format; the operands of TF32 are stored as float32.
EXACT_OPERAND = {torch.bfloat16: 2**8, torch.float16: 2**11, torch.float32: 2**11}


class Counts(NamedTuple):
    """Spike counts behind a tensor of counts times an amplitude.

    Attributes:
        values: The counts, in the shape of the tensor, in a floating-point type.
        amplitude: Factor between the counts and the tensor.
        largest: The largest count that is possible.
    """

    values: Tensor
    amplitude: Scalar
    largest: int


class _Note(NamedTuple):
    """Counts of a tensor (``None``: they follow from it), its type and its version when they were noted."""

    counts: Tensor | None
    amplitude: Scalar
    largest: int
    dtype: torch.dtype
    version: int


# By storage, as in `qsd.lean.operands`. A change in place, through any view, gives the tensor another version. (PyTorch
# does not count writing through ``.data`` as a change.)
_NOTES: WeakKeyDictionary[UntypedStorage, _Note] = WeakKeyDictionary()


def noting(package: Any, x: Tensor) -> Any:
    """A package with ``fixed_spikes`` and ``learned_spikes`` whose functions also note what `counts_of` needs.

    Args:
        package: `qsd.functional` or `qsd.lean`.
        x: Input of the neuron.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return package
    return _Training(package) if torch.is_grad_enabled() else _Evaluation


class _Evaluation:
    """The functions of `qsd.functional`, with the same bits, which note the counts of their output."""

    @staticmethod
    def fixed_spikes(
        x: Tensor, time_steps: int, threshold: float | None, amplitude: float, rule: CountRule = HALF_UP
    ) -> Tensor:
        # Tensors of the inference mode have no version that would tell a change.
        with torch.inference_mode(False), torch.no_grad():
            counts = functional.fixed_spikes(x, time_steps, threshold, 1.0, rule)
            return with_counts(counts, amplitude, time_steps)

    @staticmethod
    def learned_spikes(x: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            counts = functional.learned_spikes(x, threshold, None, time_steps)
            return with_counts(counts, 1.0 if amplitude is None else amplitude, time_steps)


class _Training(NamedTuple):
    """The functions of a package, which note the amplitude of their output, so that counts follow from it."""

    package: Any

    def fixed_spikes(self, x: Tensor, time_steps: int, threshold: float | None, amplitude: float, *rule: Any) -> Tensor:
        output: Tensor = self.package.fixed_spikes(x, time_steps, threshold, amplitude, *rule)
        return note_amplitude(output, amplitude, time_steps)

    def learned_spikes(self, x: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int) -> Tensor:
        output: Tensor = self.package.learned_spikes(x, threshold, amplitude, time_steps)
        return note_amplitude(output, 1.0 if amplitude is None else amplitude.detach().clone(), time_steps)


def note_amplitude(output: Tensor, amplitude: Scalar, largest: int) -> Tensor:
    """Note that a tensor consists of counts times an amplitude, if it is float32, and return it.

    Args:
        output: Counts times the amplitude.
        amplitude: Factor of the counts, without a gradient.
        largest: The largest count that is possible.
    """
    if output.dtype == torch.float32:  # Half precision would leave large counts in doubt.
        _NOTES[output.untyped_storage()] = _Note(None, amplitude, largest, output.dtype, output._version)
    return output


def with_counts(counts: Tensor, amplitude: Scalar, largest: int) -> Tensor:
    """Counts times an amplitude, with a note of the counts. Call it outside of the inference mode.

    Args:
        counts: Dense tensor of counts.
        amplitude: Factor of the counts.
        largest: The largest count that is possible.
    """
    itself = not isinstance(amplitude, Tensor) and amplitude == 1
    output = counts if itself else counts * amplitude
    if output.stride() == counts.stride():
        kept = None if itself else counts.to(operand_dtype(counts.device, largest))
        _NOTES[output.untyped_storage()] = _Note(kept, amplitude, largest, output.dtype, output._version)
    return output


def counts_of(x: Tensor) -> Counts | None:
    """The counts of a neuron's output or of a view of it, if they were noted and it has not been changed since.

    Args:
        x: Any tensor.
    """
    if type(x) is not Tensor or x.is_inference():
        return None
    note = _NOTES.get(x.untyped_storage())
    if note is None or x.dtype != note.dtype or x._version != note.version:
        return None
    if note.counts is not None:
        values = note.counts.as_strided(x.shape, x.stride(), x.storage_offset())
    elif not isinstance(note.amplitude, Tensor) and note.amplitude == 1:
        values = x.detach()
    else:
        values = (x.detach() / note.amplitude).round_()  # Both roundings are far below 1/2.
    return Counts(values, note.amplitude, note.largest)


def mean_of_counts(x: Tensor) -> Counts | None:
    """The sums of counts over the positions, with the amplitude over their number, if `counts_of` knows them.

    Args:
        x: A neuron's output ``[B, C, H, W]``.

    Returns:
        Sums ``[B, C]`` in float32.
    """
    counts, positions = counts_of(x), x.shape[2:].numel()
    if counts is None or counts.largest * positions >= EXACT_SUM:
        return None
    sums = counts.values.sum((2, 3), dtype=torch.float32)
    return Counts(sums, counts.amplitude / positions, counts.largest * positions)


def operand_dtype(device: torch.device, largest: int) -> torch.dtype:
    """The type of the operands of a sum: autocast's on CUDA devices, if it holds the counts, else float32.

    Args:
        device: Device of the operands.
        largest: The largest count that is possible.
    """
    if device.type == "cuda" and _STORES_FLOAT32 and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        if dtype in HALF_TYPES and largest <= EXACT_OPERAND[dtype]:
            return dtype
    return torch.float32


# Whether products of half precision can be stored in float32.
_STORES_FLOAT32 = "dtype" in torch.ops.aten.mm.overloads() and "dtype" in torch.ops.aten.bmm.overloads()


def largest_sum(inputs: int, largest: int, bits: int) -> int:
    """A bound of the absolute value of all partial sums of counts times codes; they are exact below ``EXACT_SUM``.

    Args:
        inputs: Inputs of one output: channels of a group times positions of the kernel.
        largest: The largest count that is possible.
        bits: Bits of the codes, which are at least ``-2**(bits - 1)``.
    """
    return inputs * largest * 2 ** (bits - 1)


def products(rows: Tensor, codes: Tensor) -> Tensor:
    """Products of integer matrices, stored in float32.

    Args:
        rows: ``[..., I, K]`` with no or one leading dimension, in float32 or half precision.
        codes: ``[..., K, J]``, in the same type.
    """
    if rows.is_cuda and rows.dtype in HALF_TYPES:
        product = torch.mm if rows.dim() == 2 else torch.bmm
        return product(rows, codes, out_dtype=torch.float32)
    return rows.float() @ codes.float()


def convolved(counts: Tensor, codes: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    """A convolution of integers as a product of matrices, in float32, without padding.

    The kernel's positions are copied side by side, unless it covers one pixel: k * k times the memory of the counts.

    Args:
        counts: ``[B, C_in, H, W]``.
        codes: ``[C_out, C_in / groups, k_h, k_w]``, in the type of the counts.
        stride: Stride by dimension.
        dilation: Dilation by dimension.
        groups: Groups of channels.

    Returns:
        ``[B, C_out, H', W']`` in the memory format of channels last.
    """
    outputs, channels, *kernel = codes.shape
    sides = [
        (side - step * (taps - 1) - 1) // move + 1
        for side, taps, move, step in zip(counts.shape[2:], kernel, stride, dilation, strict=True)
    ]
    images, (b, c, h, w) = len(counts), counts.stride()
    seen = counts.as_strided(
        (images, *sides, groups, channels, *kernel),
        (b, h * stride[0], w * stride[1], c * channels, c, h * dilation[0], w * dilation[1]),
        counts.storage_offset(),
    )
    size = codes[0].numel()
    if groups == 1:
        sums = products(seen.reshape(-1, size), codes.reshape(outputs, size).t())
    else:
        rows = seen.reshape(-1, groups, size).transpose(0, 1)
        sums = products(rows, codes.reshape(groups, -1, size).transpose(1, 2)).transpose(0, 1)
    return sums.reshape(images, *sides, outputs).permute(0, 3, 1, 2)
