"""Spike counts in half a byte: the memory-efficient form of a neuron's output.

A neuron's output is a count ``0..T`` times an amplitude. An ordinary training step keeps it as a float for the layer
that it enters, and one byte per element for the neuron: whether the gradient passes. Both fit into a code of four bits
for T up to 7 (two codes to a byte) and of eight bits for T up to 127.

All elementwise work runs block by block over the memory of a tensor. A block fits into the cache of a processor core,
so that a dozen passes over it cost about as much as one pass over a large tensor.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# One number, or a tensor without dimensions.
Scalar = float | Tensor

# Elements of a block for each thread of the processor. It has to be even.
_BLOCK = 2**15
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
        for start in range(0, self.numel, self.block):
            _unpack_counts(self._part(packed, start), self.bits, flat[start : start + self.block], amplitude)
        return flat

    def masked(self, packed: Tensor, grad: Tensor) -> Tensor:
        """The gradient where the neuron lets it pass, else 0, in fresh memory.

        Args:
            packed: Codes, uint8.
            grad: ``[numel]``, in the order of memory.
        """
        flat = torch.empty_like(grad)
        for start in range(0, self.numel, self.block):
            part, out = self._part(packed, start), flat[start : start + self.block]
            if self.bits == 8:
                out.copy_(torch.bitwise_right_shift(part, 7))
            else:
                half = len(part)
                out[:half] = torch.bitwise_right_shift(part, 3).bitwise_and_(1)
                out[half:] = torch.bitwise_right_shift(part, 7)[: len(out) - half]
            out.mul_(grad[start : start + self.block])
        return flat

    def matches(self, packed: Tensor, x: Tensor) -> bool:
        """Whether the memory of a tensor holds exactly the neuron's output, bit by bit.

        Args:
            packed: Codes, uint8.
            x: Any tensor; the whole of its memory is compared, in the type of ``x``.
        """
        if x.untyped_storage().nbytes() != self.numel * x.element_size() or self.numel == 0:
            return False
        actual = x.as_strided((self.numel,), (1,), 0)
        expected = torch.empty(min(self.numel, self.block), dtype=self.dtype, device=x.device)
        for start in range(0, self.numel, self.block):
            part = actual[start : start + self.block]
            decoded = expected[: len(part)]
            _unpack_counts(self._part(packed, start), self.bits, decoded, self.amplitude)
            if not _same_bits(part, decoded.to(x.dtype)):
                return False
        return True

    def _part(self, packed: Tensor, start: int) -> Tensor:
        if self.block >= self.numel:
            return packed
        return packed[start * self.bits // 8 : (start + self.block) * self.bits // 8]


def _unpack_counts(part: Tensor, bits: int, out: Tensor, amplitude: Scalar) -> None:
    """Write the counts of one block, times the amplitude, into a tensor."""
    if bits == 8:
        out.copy_(torch.bitwise_and(part, 127))
    else:
        half = len(part)
        out[:half] = torch.bitwise_and(part, 7)
        out[half:] = torch.bitwise_right_shift(part, 4).bitwise_and_(7)[: len(out) - half]
    if isinstance(amplitude, Tensor) or amplitude != 1:
        out.mul_(amplitude)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # Compared as integers, eight bytes at a time where that divides, because `torch.equal` goes element by element.
    size = a.element_size()
    kind = torch.int64 if a.numel() * size % 8 == 0 else _INTEGERS[size]
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
    x: Tensor, time_steps: int, threshold: Scalar | None, amplitude: Scalar
) -> tuple[Tensor, Layout, Tensor | None]:
    """Spike counts times an amplitude, and their codes.

    Args:
        x: Accumulated input, any shape.
        time_steps: T, at most 127.
        threshold: The divisor of the input; ``None`` for ``1 / T``, as a product with T.
        amplitude: Factor of the counts.

    Returns:
        The output, dense, in the shape and dtype of ``x``; the layout of the codes and the codes, uint8. There are no
        codes for an input with NaNs: they would stand for a count.
    """
    output = torch.empty_like(x)
    source, target = flat(dense(x, output.stride())), flat(output)
    count, block = x.numel(), _BLOCK * torch.get_num_threads() if x.is_cpu else max(2, 2 * x.numel())
    bits = 4 if time_steps <= 7 else 8
    highest = x.new_full((), 2 ** (bits - 1))
    buffer = x.new_empty(min(count, block))
    is_one = not isinstance(amplitude, Tensor) and amplitude == 1
    parts: list[Tensor] | None = []
    for start in range(0, count, block):
        part, counts = source[start : start + block], target[start : start + block]
        drive = buffer[: len(part)]
        if threshold is None:
            torch.mul(part, time_steps, out=drive)
        else:
            torch.div(part, threshold, out=drive)
        torch.add(drive, 0.5, out=counts).floor_().clamp_(0, time_steps)
        if parts is not None:
            packed = _pack_(drive, counts, time_steps, highest, bits)
            parts = None if packed is None else [*parts, packed]
        if not is_one:
            counts.mul_(amplitude)
    copy = amplitude.detach().clone() if isinstance(amplitude, Tensor) else amplitude
    layout = Layout(bits, count, block, x.dtype, copy)
    if not parts:
        return output, layout, None
    return output, layout, parts[0] if len(parts) == 1 else torch.cat(parts)


def _pack_(drive: Tensor, counts: Tensor, time_steps: int, highest: Tensor, bits: int) -> Tensor | None:
    """The codes of one block, computed in the memory of the drive; ``None`` if there are NaNs."""
    # The highest bit is set where 0 < drive < T, strictly: the derivative of a hard tanh, in one pass over floats.
    # Everything is computed on floats, because comparisons and operations on bytes are slow on a CPU.
    packed = torch.ops.aten.hardtanh_backward.grad_input(highest, drive, 0, time_steps, grad_input=drive).add_(counts)
    if bits == 4:
        half = (len(packed) + 1) // 2
        low, high = packed[:half], packed[half:]
        low[: len(high)].add_(high, alpha=16)
        packed = low
    if not packed.amax().item() >= 0:  # NaN compares as false
        return None
    return packed.to(torch.int32).to(torch.uint8)  # three times faster than in one step
