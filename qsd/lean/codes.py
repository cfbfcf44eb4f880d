"""Spike counts in half a byte: the memory-efficient form of a neuron's output.

A neuron's output is a count ``0..T`` times an amplitude. An ordinary training step keeps it as a float for the layer
that it enters, and one byte per element for the neuron: whether the gradient passes. Both fit into a code of four bits
for T up to 7 (two codes to a byte) and of eight bits for T up to 127.

All elementwise work runs block by block over the memory of a tensor. Blocks stay in the cache of a processor, so that a
dozen passes over each of them cost less than a few passes over a large tensor, and are long enough for the calls to
PyTorch not to matter.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from qsd.functional import HALF_UP, CountRule, dot
from qsd.kernels import switch
from qsd.lean import memory
from qsd.lean.memory import dense, flat, integers, scratch
from qsd.rounding import HALF_TYPES, tie_slack, window

# One number, or a tensor without dimensions.
Scalar = float | Tensor


class Layout(NamedTuple):
    """The description of codes without the codes themselves.

    Attributes:
        bits: Bits of a code, 4 or 8. The highest bit tells whether the neuron's gradient passes.
        numel: Number of elements.
        block: Number of elements that are packed together. With four bits, the first half of a block is in the low
            halves of its bytes and the second half of the block in the high halves.
        dtype: Floating-point type in which counts and amplitude are multiplied.
        amplitude: Factor between counts and the neuron's output.
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

        The next call in this thread writes into the same memory, see `qsd.lean.memory.scratch`.

        Args:
            packed: Codes, uint8.
            dtype: Type that the output is rounded to.
        """
        if self.in_kernels() and dtype in switch.KINDS:
            from qsd.kernels import neurons

            return neurons.decode(packed, self.numel, self.bits, self.amplitude, self.dtype, dtype, self.bad)
        result = scratch(self.numel, self.dtype, packed)
        for codes, out in reversed(self._blocks(packed, result)):
            _unpack(codes, self.bits, out, self.amplitude)
        return self._with_nan(result).to(dtype)

    def in_kernels(self) -> bool:
        """Whether kernels read the codes: a kernel made them, as one block, and none was switched off since."""
        return self.bad is not None and bool(switch.devices) and self.numel <= self.block

    def _with_nan(self, values: Tensor) -> Tensor:
        return values if self.bad is None or not self.bad.item() else values.fill_(torch.nan)

    def masked(
        self, packed: Tensor, grad: Tensor, blocks_nan: bool = False, totals: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient where the neuron lets it pass, else 0, in fresh memory, and its product with the counts.

        Args:
            packed: Codes, uint8.
            grad: ``[numel]``, in the order of memory.
            blocks_nan: Whether a gradient of NaN is 0, too, where it does not pass, as plain learned neurons have it.
            totals: Whether the sum of the whole gradient times the counts is needed.
        """
        flat = torch.empty_like(grad)
        total = torch.zeros((), device=grad.device) if totals else None
        for codes, out, part in reversed(self._blocks(packed, flat, grad)):
            if total is not None:  # while the block is in the cache
                _unpack(codes, self.bits, out)
                total = total + dot(part, out)
            _unpack(codes, self.bits, out, flags=True)
            if blocks_nan:
                torch.ops.aten.hardtanh_backward.grad_input(part, out, 0.5, 1.5, grad_input=out)
            else:
                out.mul_(part)
        return self._with_nan(flat), None if total is None else self._with_nan(total)

    def _blocks(self, packed: Tensor, *values: Tensor) -> list[tuple[Tensor, ...]]:
        """The blocks of codes and of tensors ``[numel]``.

        They are read in the opposite order of that in which they were written: the end is in the cache still.
        """
        if self.numel <= self.block:
            return [(packed, *values)]
        return [*zip(packed.split(self.block * self.bits // 8), *[x.split(self.block) for x in values])]

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
        if x.untyped_storage().nbytes() != self.numel * x.element_size() or not self.in_kernels():
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
        actual = x.as_strided((self.numel,), (1,), 0)
        wide, narrow = integers(size, self.numel * size % 8 == 0)
        if self.numel <= self.block:  # Small networks have one block each, where every call counts.
            blocks: list[tuple[Tensor, ...]] = [(packed, actual)]
            buffer = torch.empty(self.numel, dtype=self.dtype, device=x.device)
        else:
            blocks, buffer = self._blocks(packed, actual), scratch(self.block, self.dtype, packed)
        for codes, part in reversed(blocks):
            expected = buffer if part.numel() == buffer.numel() else buffer[: part.numel()]
            _unpack(codes, self.bits, expected, self.amplitude)
            lowest, highest = torch.aminmax(expected.to(x.dtype).view(wide).bitwise_xor_(part.view(wide)).view(narrow))
            if lowest.item() != 0 or highest.item() != 0:
                return False
        return True


def _unpack(codes: Tensor, bits: int, out: Tensor, amplitude: Scalar = 1.0, flags: bool = False) -> None:
    """Write the counts of one block times the amplitude, or whether the neuron's gradient passes, into floats."""
    place, mask = (bits - 1, 1) if flags else (0, 2 ** (bits - 1) - 1)
    half = torch.bitwise_right_shift(codes, place).bitwise_and_(mask) if flags else torch.bitwise_and(codes, mask)
    if bits == 8:
        out.copy_(half)
    else:
        rest = out.numel() - half.numel()  # The last high half of an odd block is void.
        first, second = out.split_with_sizes((half.numel(), rest))
        first.copy_(half)
        torch.bitwise_right_shift(codes, place + 4, out=half)
        second.copy_((half if flags else half.bitwise_and_(mask))[:rest])
    if isinstance(amplitude, Tensor) or amplitude != 1:
        out.mul_(amplitude)


def fire(
    x: Tensor, time_steps: int, threshold: Scalar | None, amplitude: Scalar, rule: CountRule = HALF_UP
) -> tuple[Tensor, Layout, Tensor | None]:
    """Spike counts times an amplitude, and their codes.

    Args:
        x: Accumulated input, any shape.
        time_steps: T, at most 127.
        threshold: The divisor of the input; ``None`` for ``1 / T``, as a product with T.
        amplitude: Factor of the counts, which the layout keeps; a tensor has to be one that nobody changes.
        rule: Rounding of halves, and the window of the gradient.

    Returns:
        The dense output, like ``x``; the layout of the codes; the codes, uint8, or ``None`` for NaNs (not by kernels).
    """
    if switch.devices and switch.computes(x, threshold, amplitude):
        return _fire_by_kernel(x, time_steps, threshold, amplitude, rule)
    output, count = torch.empty_like(x), x.numel()
    x = x if x.stride() == output.stride() else dense(x, output.stride())
    source, target = x.as_strided((count,), (1,)), output.as_strided((count,), (1,))
    block = memory.block_length(count, memory.BLOCK * torch.get_num_threads()) if x.is_cpu else max(2, 2 * count)
    bits, highest = (4, x.new_full((), 8)) if time_steps <= 7 else (8, x.new_full((), 128))
    exact = rule.slack is None and x.dtype == torch.float64
    slack = tie_slack(x, time_steps, threshold) if exact else rule.slack or 0.0
    other = rule.half_even or x.dtype in HALF_TYPES
    bounds = window(x.dtype, time_steps, True) if rule.closed else (0.0, float(time_steps))
    operation, factor = (torch.mul, time_steps) if threshold is None else (torch.div, threshold)
    packed = torch.empty(-(-count * bits // 8), dtype=torch.uint8, device=x.device)
    coded, layout = count > 0, Layout(bits, count, block, x.dtype, amplitude)
    # One buffer for all blocks: fresh memory is slow on a CPU.
    blocks = [(packed, source, target)] if count <= block else layout._blocks(packed, source, target)
    buffer = x.new_empty(count) if count <= block else scratch(block, x.dtype, x)
    for codes, part, counts in blocks:
        drive = buffer if part.numel() == buffer.numel() else buffer[: part.numel()]
        operation(part, factor, out=drive)
        rounded = _round(drive, counts, rule.half_even) if other else torch.add(drive, 0.5 + slack, out=counts).floor_()
        rounded.clamp_(0, time_steps)
        if coded:
            # The highest bit is set strictly between the bounds: the derivative of a hard tanh, in one pass.
            flags = torch.ops.aten.hardtanh_backward.grad_input(highest, drive, *bounds, grad_input=drive)
            coded = _write_bytes(flags.add_(counts), bits, codes)
        if isinstance(amplitude, Tensor) or amplitude != 1:
            counts.mul_(amplitude)
    return output, layout, packed if coded else None


def _fire_by_kernel(
    x: Tensor, time_steps: int, threshold: Scalar | None, amplitude: Scalar, rule: CountRule
) -> tuple[Tensor, Layout, Tensor | None]:
    from qsd.kernels import neurons, spikes

    bits, bounds = spikes.code_bits(time_steps), window(x.dtype, time_steps, rule.closed)
    slack = rule.slack or 0.0
    output, codes, bad = neurons.fire(
        x, time_steps, threshold, amplitude, bounds, slack, rule.half_even, bits, check=True
    )
    return output, Layout(bits, x.numel(), 2 * x.numel(), x.dtype, amplitude, bad), codes


def _round(drive: Tensor, counts: Tensor, half_even: bool) -> Tensor:
    """Write the drive, with halves to even or in half precision, into the memory of the counts, see `qsd.rounding`."""
    return torch.round(drive, out=counts) if half_even else counts.copy_(drive.float().add_(0.5).floor_())


def _write_bytes(values: Tensor, bits: int, codes: Tensor) -> bool:
    """Write the codes of one block as bytes, by way of the memory of the floats; whether there were no NaNs."""
    # Everything is computed on floats, because comparisons and operations on bytes are slow on a CPU.
    if bits == 4:
        count = values.numel() // 2
        values, high = values.split_with_sizes((values.numel() - count, count))
        values[:count].add_(high, alpha=16)
    if not values.is_meta and not isinstance(values, FakeTensor) and not values.amax().item() >= 0:
        return False  # a NaN, which compares as false
    # By way of integers, which is three times faster than in one step.
    codes.copy_(values.view(torch.int32).copy_(values) if values.itemsize == 4 else values.to(torch.int32))
    return True


def encode_counts(x: Tensor, layout: Layout) -> tuple[Layout, Tensor] | None:
    """The codes of a tensor that consists of counts times an amplitude, such as the largest of some counts.

    Args:
        x: Dense tensor.
        layout: Layout of the codes that the counts were taken from.

    Returns:
        Layout and codes, uint8, or ``None`` if there are NaNs. The bits for the neuron's gradient are not set.
    """
    codes = torch.empty(-(-x.numel() * layout.bits // 8), dtype=torch.uint8, device=x.device)
    for part, written in zip(flat(x).split(layout.block), codes.split(layout.block * layout.bits // 8)):
        if not _write_bytes(torch.div(part, layout.amplitude).round_(), layout.bits, written):
            return None
    return layout._replace(numel=x.numel()), codes
