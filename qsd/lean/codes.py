"""Spike counts in half a byte: the memory-efficient form of a neuron's output.

A neuron's output is a count ``0..T`` times an amplitude. An ordinary training step keeps it as a float for the layer
that it enters, and one byte per element for the neuron: whether the gradient passes. Both fit into a code of four bits
for T up to 7 (two codes to a byte) and of eight bits for T up to 127.

All elementwise work runs block by block over the memory of a tensor. Blocks stay in the cache of a processor, so that a
dozen passes over each of them cost less than a few passes over a large tensor, and are long enough for the calls to
PyTorch not to matter.
"""

import threading
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from qsd.functional import HALF_UP, CountRule
from qsd.kernels import switch
from qsd.rounding import HALF_TYPES, tie_slack, window

# One number, or a tensor without dimensions.
Scalar = float | Tensor

# Elements of a block for each thread of the processor. It has to be even.
BLOCK = 2**18
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# The memory that codes are decoded into on a processor, one buffer for each thread that computes gradients.
_decoded = threading.local()


class Layout(NamedTuple):
    """The description of codes without the codes themselves.

    Attributes:
        bits: Bits of a code, 4 or 8. The highest bit tells whether the neuron's gradient passes.
        numel: Number of elements.
        block: Number of elements that are packed together. With four bits, the first half of a block is in the low
            halves of its bytes and the second half of the block in the high halves.
        dtype: Floating-point type in which counts and amplitude are multiplied.
        amplitude: Factor between counts and the neuron's output; its own copy if it is a tensor.
        bad: Whether the neuron's input had NaNs, int32 ``[1]``, where a kernel made the codes: the processor does not
            wait for it. Then the codes say nothing, and NaN stands for all values. ``None`` if there were none.
    """

    bits: int
    numel: int
    block: int
    dtype: torch.dtype
    amplitude: Scalar
    bad: Tensor | None = None

    def values(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """The neuron's output ``[numel]`` in the order of memory, with the same bits, until the next call.

        The next call of `values` or `counts` in this thread writes into the same memory, see `_scratch`.

        Args:
            packed: Codes, uint8.
            dtype: Type that the output is rounded to.
        """
        if switch.devices and self.in_kernels(packed) and dtype in switch.KINDS:
            from qsd.kernels import neurons

            return neurons.decode(packed, self.numel, self.bits, self.amplitude, self.dtype, dtype, self.bad)
        return self._unpacked(packed, self.amplitude).to(dtype)

    def in_kernels(self, packed: Tensor) -> bool:
        """Whether kernels read the codes, which have to be packed as one block.

        Args:
            packed: Codes, uint8.
        """
        return self.numel <= self.block and switch.fit(packed.device, self.dtype, self.numel, self.amplitude)

    def counts(self, packed: Tensor) -> Tensor:
        """The counts ``[numel]`` in the order of memory, until the next call, as for `values`.

        Args:
            packed: Codes, uint8.
        """
        return self._unpacked(packed, 1.0)

    def _unpacked(self, packed: Tensor, amplitude: Scalar) -> Tensor:
        flat = _scratch(self.numel, self.dtype, packed)
        for codes, out in self._blocks(packed, flat):
            _unpack(codes, self.bits, out, amplitude)
        return self._with_nan(flat)

    def _with_nan(self, values: Tensor) -> Tensor:
        return values if self.bad is None or not self.bad.item() else values.fill_(torch.nan)

    def masked(self, packed: Tensor, grad: Tensor, blocks_nan: bool = False) -> Tensor:
        """The gradient where the neuron lets it pass, else 0, in fresh memory.

        Args:
            packed: Codes, uint8.
            grad: ``[numel]``, in the order of memory.
            blocks_nan: Whether a gradient of NaN is 0, too, where it does not pass, as plain learned neurons have it.
        """
        flat = torch.empty_like(grad)
        for codes, out, part in self._blocks(packed, flat, grad):
            _unpack(codes, self.bits, out, flags=True)
            if blocks_nan:
                torch.ops.aten.hardtanh_backward.grad_input(part, out, 0.5, 1.5, grad_input=out)
            else:
                out.mul_(part)
        return self._with_nan(flat)

    def _blocks(self, packed: Tensor, *values: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """The blocks of codes and of tensors ``[numel]``."""
        if self.numel <= self.block:
            return ((packed, *values),)
        return zip(packed.split(self.block * self.bits // 8), *[x.split(self.block) for x in values])

    def difference(self, packed: Tensor, x: Tensor) -> Tensor | None:
        """The comparison of `matches` by a kernel, whose result nobody has waited for.

        Args:
            packed: Codes, uint8.
            x: Any tensor.

        Returns:
            A number, int32 ``[1]``, that is not 0 if ``x`` differs; ``None`` if no kernel compares.
        """
        if isinstance(x, FakeTensor) or x.dtype not in switch.KINDS:
            return None
        if x.untyped_storage().nbytes() != self.numel * x.element_size() or not self.in_kernels(packed):
            return None
        from qsd.kernels import neurons

        memory = x.as_strided((self.numel,), (1,), 0)
        return neurons.difference(packed, memory, self.bits, self.amplitude, self.dtype, self.bad)

    def matches(self, packed: Tensor, x: Tensor) -> bool:
        """Whether the memory of a tensor holds exactly the neuron's output, bit by bit.

        Args:
            packed: Codes, uint8.
            x: Any tensor; the whole of its memory is compared, in the type of ``x``.
        """
        size = x.element_size()
        if x.untyped_storage().nbytes() != self.numel * size or self.numel == 0:
            return False
        differs = self.difference(packed, x) if switch.devices else None
        if differs is not None:
            return differs.item() == 0
        if x.is_meta or isinstance(x, FakeTensor):  # shapes without values, to count bytes
            return True
        # Compared as integers, eight bytes at a time where that divides. Where two of them differ, the bits of "one or
        # the other" are not all zero. `torch.equal` takes one and a half times as long.
        actual = x.as_strided((self.numel,), (1,), 0)
        kind = torch.int64 if self.numel * size % 8 == 0 else _INTEGERS[size]
        buffer = torch.empty(min(self.numel, self.block), dtype=self.dtype, device=x.device)
        # Small networks have one block each, where every call counts.
        blocks = ((packed, actual),) if self.numel <= self.block else self._blocks(packed, actual)
        for codes, part in blocks:
            expected = buffer if part.numel() == buffer.numel() else buffer[: part.numel()]
            _unpack(codes, self.bits, expected, self.amplitude)
            lowest, highest = torch.aminmax(expected.to(x.dtype).view(kind).bitwise_xor_(part.view(kind)))
            if lowest.item() != 0 or highest.item() != 0:
                return False
        return True


def _scratch(numel: int, dtype: torch.dtype, codes: Tensor) -> Tensor:
    """Memory for decoded values ``[numel]``; on a processor the same for every call of a thread.

    The first write to a page of fresh memory takes several times as long as decoding its values, and a layer's backward
    pass needs the values of one operand at a time. The buffer is as long as the longest operand.
    """
    if not codes.is_cpu or isinstance(codes, FakeTensor):
        return torch.empty(numel, dtype=dtype, device=codes.device)
    size = numel * dtype.itemsize
    buffer: Tensor | None = getattr(_decoded, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _decoded.buffer = torch.empty(size, dtype=torch.uint8)
    return buffer[:size].view(dtype)


def _unpack(codes: Tensor, bits: int, out: Tensor, amplitude: Scalar = 1.0, flags: bool = False) -> None:
    """Write the counts of one block times the amplitude, or whether the neuron's gradient passes, into floats."""
    place, mask = (bits - 1, 1) if flags else (0, 2 ** (bits - 1) - 1)
    low = torch.bitwise_and(torch.bitwise_right_shift(codes, place) if flags else codes, mask)
    if bits == 8:
        out.copy_(low)
    else:
        high = torch.bitwise_right_shift(codes, place + 4)
        rest = out.numel() - low.numel()  # The last high half of an odd block is void.
        first, second = out.split_with_sizes((low.numel(), rest))
        first.copy_(low)
        second.copy_((high if flags else high.bitwise_and_(mask))[:rest])
    if isinstance(amplitude, Tensor) or amplitude != 1:
        out.mul_(amplitude)


def same_bits_(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the same shape are equal, bit by bit if they have the same strides.

    Args:
        a: Dense tensor, not empty, which is overwritten.
        b: Any tensor.
    """
    if a.stride() != b.stride():
        return torch.equal(a, b)
    a, b = flat(a), flat(b)
    size = a.element_size()
    kind = torch.int64 if len(a) * size % 8 == 0 and b.storage_offset() * size % 8 == 0 else _INTEGERS[size]
    lowest, highest = torch.aminmax(a.view(kind).bitwise_xor_(b.view(kind)))  # see `Layout.matches`
    return lowest.item() == highest.item() == 0


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
        The dense output, like ``x``; the layout of the codes; the codes, uint8, or ``None`` for NaNs (not by kernels).
    """
    if switch.devices and switch.computes(x, threshold, amplitude):
        return _fire_by_kernel(x, time_steps, threshold, amplitude, rule)
    output, count = torch.empty_like(x), x.numel()
    x = x if x.stride() == output.stride() else dense(x, output.stride())
    source, target = x.as_strided((count,), (1,)), output.as_strided((count,), (1,))
    block = BLOCK * torch.get_num_threads() if x.is_cpu else max(2, 2 * count)
    bits, highest = (4, x.new_full((), 8)) if time_steps <= 7 else (8, x.new_full((), 128))
    exact = rule.slack is None and x.dtype == torch.float64
    slack = tie_slack(x, time_steps, threshold) if exact else rule.slack or 0.0
    other = rule.half_even or x.dtype in HALF_TYPES
    bounds = window(x.dtype, time_steps, True) if rule.closed else (0.0, float(time_steps))
    operation, factor = (torch.mul, time_steps) if threshold is None else (torch.div, threshold)
    parts: list[Tensor] | None = []
    buffer = x.new_empty(min(count, block))  # one for all blocks: fresh memory is slow on a CPU
    blocks = ((source, target),) if count <= block else zip(source.split(block), target.split(block))
    for part, counts in blocks:
        drive = buffer if part.numel() == buffer.numel() else buffer[: part.numel()]
        operation(part, factor, out=drive)
        rounded = _round(drive, counts, rule.half_even) if other else torch.add(drive, 0.5 + slack, out=counts).floor_()
        rounded.clamp_(0, time_steps)
        if parts is not None and count:
            # The highest bit is set strictly between the bounds: the derivative of a hard tanh, in one pass.
            flags = torch.ops.aten.hardtanh_backward.grad_input(highest, drive, *bounds, grad_input=drive)
            packed = _bytes_(flags.add_(counts), bits)
            parts = None if packed is None else [*parts, packed]
        if isinstance(amplitude, Tensor) or amplitude != 1:
            counts.mul_(amplitude)
    amplitude = amplitude.detach().clone() if isinstance(amplitude, Tensor) else amplitude
    layout = Layout(bits, count, block, x.dtype, amplitude)
    return output, layout, None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)


def _fire_by_kernel(
    x: Tensor, time_steps: int, threshold: Scalar | None, amplitude: Scalar, rule: CountRule
) -> tuple[Tensor, Layout, Tensor | None]:
    from qsd.kernels import neurons, spikes

    bits, bounds = spikes.code_bits(time_steps), window(x.dtype, time_steps, rule.closed)
    slack = rule.slack or 0.0
    output, codes, bad = neurons.fire(
        x, time_steps, threshold, amplitude, bounds, slack, rule.half_even, bits, check=True
    )
    amplitude = amplitude.detach().clone() if isinstance(amplitude, Tensor) else amplitude
    return output, Layout(bits, x.numel(), 2 * x.numel(), x.dtype, amplitude, bad), codes


def _round(drive: Tensor, counts: Tensor, half_even: bool) -> Tensor:
    """Write the drive, with halves to even or in half precision, into the memory of the counts, see `qsd.rounding`."""
    return torch.round(drive, out=counts) if half_even else counts.copy_(drive.float().add_(0.5).floor_())


def _bytes_(values: Tensor, bits: int) -> Tensor | None:
    """The codes of one block as bytes, computed in the memory of the floats; ``None`` if there are NaNs."""
    # Everything is computed on floats, because comparisons and operations on bytes are slow on a CPU.
    if bits == 4:
        count = values.numel() // 2
        values, high = values.split_with_sizes((values.numel() - count, count))
        values[:count].add_(high, alpha=16)
    if not values.is_meta and not isinstance(values, FakeTensor) and not values.amax().item() >= 0:
        return None  # a NaN, which compares as false
    return values.to(torch.int32).to(torch.uint8)  # three times faster than in one step


def encode_counts(x: Tensor, layout: Layout) -> tuple[Layout, Tensor] | None:
    """The codes of a tensor that consists of counts times an amplitude, such as the largest of some counts.

    Args:
        x: Dense tensor.
        layout: Layout of the codes that the counts were taken from.

    Returns:
        Layout and codes, uint8, or ``None`` if there are NaNs. The bits for the neuron's gradient are not set.
    """
    parts = []
    for part in flat(x).split(layout.block):
        packed = _bytes_(torch.div(part, layout.amplitude).round_(), layout.bits)
        if packed is None:
            return None
        parts.append(packed)
    return layout._replace(numel=x.numel()), torch.cat(parts)
