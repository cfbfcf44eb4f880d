"""Triton programs of weight quantizers; `qsd.kernels.programs` says how they compute."""

import triton
import triton.language as tl

from qsd.kernels.programs import drive_of, half_even, rounded, single


@triton.jit
def clamped(v, least, most):
    """Numbers within a range; a NaN stays one."""
    return tl.where(v < least, least, tl.where(v > most, most, v))


@triton.jit
def quantize(
    weight, step, out, size, columns, q_min, q_max, KIND: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr
):
    """LSQ of weights: each to the nearest point of the grid of its row, then to the type of the result."""
    q_min, q_max = single(q_min), single(q_max)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    scale = tl.load(step + place // columns, mask=mask, other=1.0).to(tl.float32)
    scaled = drive_of(tl.load(weight + place, mask=mask, other=0.0).to(tl.float32), scale, True, KIND)
    value = rounded(half_even(clamped(scaled, q_min, q_max)) * scale, KIND)
    tl.store(out + place, rounded(value, OUT).to(out.dtype.element_ty), mask=mask)


@triton.jit
def quantize_backward(
    grad,
    weight,
    step,
    out,
    step_grad,
    columns,
    q_min,
    q_max,
    below,
    above,
    factor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of `quantize` for the weights and the step of one row."""
    q_min, q_max, below, above = single(q_min), single(q_max), single(below), single(above)
    row = tl.program_id(0)
    scale = tl.load(step + row).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        place = row * columns + column
        scaled = drive_of(tl.load(weight + place, mask=mask, other=0.0).to(tl.float32), scale, True, KIND)
        g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        passed = tl.where((scaled <= below) | (scaled >= above), 0.0, g)
        tl.store(out + place, passed.to(out.dtype.element_ty), mask=mask)
        sums += g * half_even(clamped(scaled, q_min, q_max)) - passed * scaled
    tl.store(step_grad + row, (tl.sum(sums, 0) * single(factor)).to(step_grad.dtype.element_ty))
