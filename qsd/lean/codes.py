"""Spike counts in half a byte: the memory-efficient form of a neuron's output.

A neuron's output is a count ``0..T`` times an amplitude. An ordinary training step keeps it as a float for the layer
that it enters, and one byte per element for the neuron: whether the gradient passes. Both fit into a code of four bits
for T up to 7 (two codes to a byte) and of eight bits for T up to 127.

All elementwise work runs block by block over the memory of a tensor. Blocks stay in the cache of a processor, so that a
dozen passes over each of them cost less than a few passes over a large tensor, and are long enough for the calls to
PyTorch not to matter.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from qsd.functional import HALF_UP, CountRule
from qsd.rounding import HALF_TYPES, tie_slack

# One number, or a tensor without dimensions.
Scalar = float | Tensor

# Elements of a block for each thread of the processor. It has to be even.
BLOCK = 2**18
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Layout(NamedTuple):
    """The description of codes without the codes themselves.

    Attributes:
        bits: Bits of a code, 4 or 8. The highest bit tells whether the neuron's gradient passes.
        numel: Number of elements.
        block: Number of elements that are packed together. With four bits, the first half of a block is in the low
            halves of its bytes and the second half of the block in the high halves.
        dtype: Floating-point type in which counts and amplitude are multiplied.
        amplitude: Factor between counts and the neuron's output; its own copy if it is a tensor.
    """

    bits: int
    numel: int
    block: int
    dtype: torch.dtype
    amplitude: Scalar

    def values(self, packed: Tensor) -> Tensor:
        """The neuron's output ``[numel]`` in the order of memory, with the same bits, in fresh memory.

        Args:
            packed: Codes, uint8.
        """
        return self._unpacked(packed, self.amplitude)

    def counts(self, packed: Tensor) -> Tensor:
        """The counts ``[numel]`` in the order of memory, in fresh memory.

        Args:
            packed: Codes, uint8.
        """
        return self._unpacked(packed, 1.0)

    def _unpacked(self, packed: Tensor, amplitude: Scalar) -> Tensor:
        flat = torch.empty(self.numel, dtype=self.dtype, device=packed.device)
        for out, codes in zip(flat.split(self.block), self._blocks(packed)):
            _unpack_counts(codes, self.bits, out, amplitude)
        return flat

    def masked(self, packed: Tensor, grad: Tensor, blocks_nan: bool = False) -> Tensor:
        """The gradient where the neuron lets it pass, else 0, in fresh memory.

        Args:
            packed: Codes, uint8.
            grad: ``[numel]``, in the order of memory.
            blocks_nan: Whether a gradient of NaN is 0, too, where it does not pass, as plain learned neurons have it.
        """
        flat = torch.empty_like(grad)
        for out, codes, part in zip(flat.split(self.block), self._blocks(packed), grad.split(self.block)):
            if self.bits == 8:
                out.copy_(torch.bitwise_right_shift(codes, 7))
            else:
                half = len(codes)
                out[:half] = torch.bitwise_right_shift(codes, 3).bitwise_and_(1)
                out[half:] = torch.bitwise_right_shift(codes, 7)[: len(out) - half]
            if blocks_nan:
                torch.ops.aten.hardtanh_backward.grad_input(part, out, 0.5, 1.5, grad_input=out)
            else:
                out.mul_(part)
        return flat

    def _blocks(self, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.split(self.block * self.bits // 8)

    def matches(self, packed: Tensor, x: Tensor) -> bool:
        """Whether the memory of a tensor holds exactly the neuron's output, bit by bit.

        Args:
            packed: Codes, uint8.
            x: Any tensor; the whole of its memory is compared, in the type of ``x``.
        """
        size = x.element_size()
        if x.untyped_storage().nbytes() != self.numel * size or self.numel == 0:
            return False
        if x.is_meta or isinstance(x, FakeTensor):  # shapes without values, to count bytes
            return True
        # Compared as integers, eight bytes at a time where that divides: `torch.equal` goes element by element.
        kind = torch.int64 if self.numel * size % 8 == 0 else _INTEGERS[size]
        actual = x.as_strided((self.numel,), (1,), 0)
        buffer = torch.empty(min(self.numel, self.block), dtype=self.dtype, device=x.device)
        for part, codes in zip(actual.split(self.block), packed.split(self.block * self.bits // 8)):
            expected = buffer if len(part) == len(buffer) else buffer[: len(part)]
            _unpack_counts(codes, self.bits, expected, self.amplitude)
            if not torch.equal(part.view(kind), expected.to(x.dtype).view(kind)):
                return False
        return True


def _unpack_counts(codes: Tensor, bits: int, out: Tensor, amplitude: Scalar) -> None:
    """Write the counts of one block, times the amplitude, into a tensor."""
    if bits == 8:
        out.copy_(torch.bitwise_and(codes, 127))
    else:
        half = len(codes)
        out[:half] = torch.bitwise_and(codes, 7)
        out[half:] = torch.bitwise_right_shift(codes, 4).bitwise_and_(7)[: len(out) - half]
    if isinstance(amplitude, Tensor) or amplitude != 1:
        out.mul_(amplitude)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the same shape are equal, bit by bit if they have the same strides.

    Args:
        a: Dense tensor.
        b: Any tensor.
    """
    if a.stride() != b.stride():
        return torch.equal(a, b)
    a, b = flat(a), flat(b)
    size = a.element_size()
    kind = torch.int64 if len(a) * size % 8 == 0 and b.storage_offset() * size % 8 == 0 else _INTEGERS[size]
    return torch.equal(a.view(kind), b.view(kind))


def dense(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A tensor, or its copy with the given strides if it has others.

    Args:
        x: Any tensor.
        stride: Strides of a dense tensor of that shape.
    """
    return x if x.stride() == stride else x.new_empty_strided(x.shape, stride).copy_(x)


def flat(x: Tensor) -> Tensor:
    """A dense tensor in the order of its memory, ``[numel]``.

    Args:
        x: Dense tensor.
    """
    return x.as_strided((x.numel(),), (1,))


def fire(
    x: Tensor, time_steps: int, threshold: Scalar | None, amplitude: Scalar, rule: CountRule = HALF_UP
) -> tuple[Tensor, Layout, Tensor | None]:
    """Spike counts times an amplitude, and their codes.

    Args:
        x: Accumulated input, any shape.
        time_steps: T, at most 127.
        threshold: The divisor of the input; ``None`` for ``1 / T``, as a product with T.
        amplitude: Factor of the counts.
        rule: Rounding of halves, and the window of the gradient.

    Returns:
        The output, dense, in the shape and dtype of ``x``; the layout of the codes and the codes, uint8. There are no
        codes for an input with NaNs: they would stand for a count.
    """
    output = torch.empty_like(x)
    if x.stride() != output.stride():
        x = dense(x, output.stride())
    count = x.numel()
    source, target = x.as_strided((count,), (1,)), output.as_strided((count,), (1,))
    block = BLOCK * torch.get_num_threads() if x.is_cpu else max(2, 2 * count)
    bits = 4 if time_steps <= 7 else 8
    highest = x.new_full((), 2 ** (bits - 1))
    slack = tie_slack(x, time_steps, threshold) if x.dtype == torch.float64 else 0.0
    other = rule.half_even or x.dtype in HALF_TYPES
    bounds = _bounds(x, time_steps) if rule.closed else (0, time_steps)
    parts: list[Tensor] | None = []
    buffer = x.new_empty(min(count, block))  # one for all blocks: fresh memory is slow on a CPU
    for part, counts in zip(source.split(block), target.split(block)):
        drive = buffer if len(part) == len(buffer) else buffer[: len(part)]
        if threshold is None:
            torch.mul(part, time_steps, out=drive)
        else:
            torch.div(part, threshold, out=drive)
        rounded = _round(drive, counts, rule.half_even) if other else torch.add(drive, 0.5 + slack, out=counts).floor_()
        rounded.clamp_(0, time_steps)
        if parts is not None and count:
            packed = _pack_(drive, counts, bounds, highest, bits)
            parts = None if packed is None else [*parts, packed]
        if isinstance(amplitude, Tensor) or amplitude != 1:
            counts.mul_(amplitude)
    copy = amplitude.detach().clone() if isinstance(amplitude, Tensor) else amplitude
    layout = Layout(bits, count, block, x.dtype, copy)
    return output, layout, None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)


def _round(drive: Tensor, counts: Tensor, half_even: bool) -> Tensor:
    """Write the drive, with halves to even or in half precision, into the memory of the counts, see `qsd.rounding`."""
    return torch.round(drive, out=counts) if half_even else counts.copy_(drive.float().add_(0.5).floor_())


def _bounds(drive: Tensor, time_steps: int) -> tuple[float, float]:
    """The numbers between which, strictly, the gradient passes in a closed window."""
    # The least normal number stands for the next float below zero: processors may take smaller ones for zero.
    kind = np.float64 if drive.dtype == torch.float64 else np.float32
    return -float(np.finfo(kind).tiny), float(np.nextafter(kind(time_steps), kind(np.inf)))


def _pack_(drive: Tensor, counts: Tensor, bounds: tuple[float, float], highest: Tensor, bits: int) -> Tensor | None:
    """The codes of one block, computed in the memory of the drive; ``None`` if there are NaNs."""
    # The highest bit is set strictly between the bounds: the derivative of a hard tanh, in one pass over floats.
    # Everything is computed on floats, because comparisons and operations on bytes are slow on a CPU.
    flags = torch.ops.aten.hardtanh_backward.grad_input(highest, drive, *bounds, grad_input=drive)
    packed = _join_(flags.add_(counts), bits)
    if not packed.is_meta and not isinstance(packed, FakeTensor) and not packed.amax().item() >= 0:
        return None  # a NaN, which compares as false
    return packed.to(torch.int32).to(torch.uint8)  # three times faster than in one step


def _join_(values: Tensor, bits: int) -> Tensor:
    """The two halves of a block in one, in its memory, if codes have four bits."""
    if bits == 8:
        return values
    halves = values.split((len(values) + 1) // 2)
    if len(halves) == 2:
        halves[0][: len(halves[1])].add_(halves[1], alpha=16)
    return halves[0]


def encode_counts(x: Tensor, layout: Layout) -> tuple[Layout, Tensor]:
    """The codes of a tensor that consists of counts times an amplitude, such as the largest of some counts.

    Args:
        x: Dense tensor.
        layout: Layout of the codes that the counts were taken from.

    Returns:
        Layout and codes, uint8. The bits for the neuron's gradient are not set.
    """
    count = x.numel()
    parts = []
    for part in flat(x).split(layout.block):
        counts = torch.div(part, layout.amplitude).round_()
        parts.append(_join_(counts, layout.bits).to(torch.int32).to(torch.uint8))
    return layout._replace(numel=count), torch.cat(parts)
