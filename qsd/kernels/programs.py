"""Triton programs: how a block of elements is computed.

All arithmetic is in float32, rounded to the type of the tensors after each operation, as PyTorch rounds on a processor.
Two rules keep the bits where a count is decided. Divisions are correctly rounded (``div_rn``; Triton's ``/`` is not).
And no product feeds a sum directly: the clamp of the drive stands between them, so that a compiler cannot contract both
to one operation with one rounding.

Codes have the layout of `qsd.lean.codes`: with four bits, a byte holds the codes of one element of the first half of
the memory and of one of the second half.
"""

import triton
import triton.language as tl


@triton.jit
def rounded(v, KIND: tl.constexpr):
    """Float32 values, rounded to the nearest number of a type, halves to even."""
    if KIND == "fp16":
        v = v.to(tl.float16).to(tl.float32)
    if KIND == "bf16":  # by integers, because Triton's interpreter cuts digits off instead
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    return v


@triton.jit
def half_even(v):
    """Numbers up to 2**22 rounded to integers, halves to the even one; the sign of a zero stays."""
    nearest = (v + 12582912.0) - 12582912.0  # 1.5 * 2**23: float32 has no digits behind the point there
    return tl.where(nearest == 0.0, v * 0.0, nearest)


@triton.jit
def single(x):
    """A number as float32: PyTorch's compiler hands numbers on as float64, and all arithmetic would follow."""
    return tl.cast(x, tl.float32)


@triton.jit
def scalar(x, IS_TENSOR: tl.constexpr):
    """A number, or the number that a pointer points to."""
    if IS_TENSOR:
        x = tl.load(x)
    return single(x)


@triton.jit
def or_nan(v, bad, CHECK: tl.constexpr):
    """Values, or NaNs if a neuron's input had one: its codes do not tell where."""
    if CHECK:
        v = tl.where(tl.load(bad) > 0, float("nan"), v)
    return v


@triton.jit
def drive_of(v, factor, DIVIDE: tl.constexpr, KIND: tl.constexpr):
    """Input in units of the threshold."""
    if DIVIDE:
        v = tl.div_rn(v, factor)
    else:
        v = v * factor
    return rounded(v, KIND)


@triton.jit
def count_of(drive, most, half, HALF_EVEN: tl.constexpr):
    """Spike counts of drives; 0 for a NaN."""
    # Clamped first, see above. Rounding then cannot leave the range, and gives the same counts.
    within = tl.where(drive > 0.0, tl.minimum(drive, most), 0.0)
    if HALF_EVEN:
        count = half_even(within)
    else:
        count = tl.minimum(tl.floor(within + half), most)
    return count


@triton.jit
def fire_elements(
    x,
    out,
    bad,
    place,
    mask,
    factor,
    amplitude,
    most,
    half,
    lowest,
    highest,
    BITS: tl.constexpr,
    CHECK: tl.constexpr,
    DIVIDE: tl.constexpr,
    HALF_EVEN: tl.constexpr,
    KIND: tl.constexpr,
):
    """Write the output of some elements, and return their codes."""
    drive = drive_of(tl.load(x + place, mask=mask, other=0.0).to(tl.float32), factor, DIVIDE, KIND)
    count = count_of(drive, most, half, HALF_EVEN)
    value = tl.where(drive == drive, rounded(count * amplitude, KIND), drive)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)
    if CHECK:
        tl.store(bad + place * 0, 1, mask=mask & (drive != drive))
    code = count.to(tl.int32)
    if BITS > 0:
        passes = (drive > lowest) & (drive < highest)
        code += passes.to(tl.int32) << (BITS - 1)
    return code


# fmt: off
@triton.jit
def fire(
    x, out, codes, bad, size, low, factor, amplitude, most, half, lowest, highest,
    BITS: tl.constexpr, CHECK: tl.constexpr, DIVIDE: tl.constexpr, HALF_EVEN: tl.constexpr,
    FACTOR_IS_TENSOR: tl.constexpr, AMPLITUDE_IS_TENSOR: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):
# fmt: on
    """A neuron's forward pass: counts times the amplitude, and their codes with the bit of the gradient.

    ``low`` is the number of bytes of codes with four bits, else ``size``, the number of elements.
    """
    factor, amplitude = scalar(factor, FACTOR_IS_TENSOR), scalar(amplitude, AMPLITUDE_IS_TENSOR)
    most, half, lowest, highest = single(most), single(half), single(lowest), single(highest)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = place < low
    code = fire_elements(
        x, out, bad, place, first, factor, amplitude, most, half, lowest, highest, BITS, CHECK, DIVIDE, HALF_EVEN, KIND
    )
    if BITS == 4:
        rest = place + low
        second = fire_elements(
            x,
            out,
            bad,
            rest,
            rest < size,
            factor,
            amplitude,
            most,
            half,
            lowest,
            highest,
            4,
            CHECK,
            DIVIDE,
            HALF_EVEN,
            KIND,
        )
        code += second << 4
    if BITS > 0:
        tl.store(codes + place, code.to(tl.uint8), mask=first)


@triton.jit
def pass_elements(
    grad,
    out,
    code,
    place,
    mask,
    bad,
    amplitude,
    factor,
    BITS: tl.constexpr,
    CHECK: tl.constexpr,
    SELECT: tl.constexpr,
    DIVIDE: tl.constexpr,
    KIND: tl.constexpr,
):
    """Write the gradient of some elements, and return its products with their counts."""
    g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
    flag = (code >> (BITS - 1)) & 1
    # A product makes NaN of an infinite gradient that does not pass, a choice makes zero of it.
    passed = tl.where(flag > 0, g, 0.0) if SELECT else g * flag.to(tl.float32)
    passed = or_nan(drive_of(rounded(passed * amplitude, KIND), factor, DIVIDE, KIND), bad, CHECK)
    tl.store(out + place, passed.to(out.dtype.element_ty), mask=mask)
    count = (code & ((1 << (BITS - 1)) - 1)).to(tl.float32)
    return tl.where(mask, or_nan(g * count, bad, CHECK), 0.0)


@triton.jit
def pass_codes(
    codes,
    grad,
    out,
    sums,
    bad,
    size,
    low,
    amplitude,
    factor,
    BITS: tl.constexpr,
    CHECK: tl.constexpr,
    SELECT: tl.constexpr,
    DIVIDE: tl.constexpr,
    SUM: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A neuron's backward pass from codes: the gradient where it passes, times amplitude, times or over a factor.

    ``sums`` gets the sum of gradient times count of each program.
    """
    amplitude, factor = single(amplitude), single(factor)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = place < low
    code = tl.load(codes + place, mask=first, other=0).to(tl.int32)
    total = pass_elements(grad, out, code, place, first, bad, amplitude, factor, BITS, CHECK, SELECT, DIVIDE, KIND)
    if BITS == 4:
        rest = place + low
        total += pass_elements(
            grad, out, code >> 4, rest, rest < size, bad, amplitude, factor, BITS, CHECK, SELECT, DIVIDE, KIND
        )
    if SUM:
        tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def pass_learned(
    x,
    grad,
    out,
    sums,
    size,
    threshold,
    amplitude,
    most,
    AMPLITUDE_IS_TENSOR: tl.constexpr,
    IS_STEP: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The backward pass of a learned threshold from the neuron's input.

    ``sums`` gets two rows of sums by program: of passed gradient times drive, negative, and of gradient times count. A
    step, which is threshold and amplitude, gets one row, of both together.
    """
    threshold, amplitude, most = scalar(threshold, True), scalar(amplitude, AMPLITUDE_IS_TENSOR), single(most)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    drive = drive_of(tl.load(x + place, mask=mask, other=0.0).to(tl.float32), threshold, True, KIND)
    g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
    passed = tl.where((drive <= 0.0) | (drive >= most), 0.0, g)
    gradient = rounded(passed * tl.div_rn(amplitude, threshold), KIND)
    tl.store(out + place, gradient.to(out.dtype.element_ty), mask=mask)
    by_count = g * count_of(drive, most, 0.5, False)
    if IS_STEP:
        tl.store(sums + tl.program_id(0), tl.sum(by_count - passed * drive, 0))
    else:
        tl.store(sums + tl.program_id(0), -tl.sum(passed * drive, 0))
        tl.store(sums + tl.num_programs(0) + tl.program_id(0), tl.sum(by_count, 0))


@triton.jit
def value_of(code, amplitude, BITS: tl.constexpr, KIND: tl.constexpr, OUT: tl.constexpr):
    """The neuron's output for a code, in its own type and then in that of the layer that it feeds."""
    count = (code & ((1 << (BITS - 1)) - 1)).to(tl.float32)
    return rounded(rounded(count * amplitude, KIND), OUT)


@triton.jit
def decode(
    codes,
    out,
    bad,
    size,
    low,
    amplitude,
    BITS: tl.constexpr,
    CHECK: tl.constexpr,
    AMPLITUDE_IS_TENSOR: tl.constexpr,
    KIND: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts times the amplitude in the type of the neuron, rounded to the type of the layer that it feeds."""
    amplitude = scalar(amplitude, AMPLITUDE_IS_TENSOR)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = place < low
    code = tl.load(codes + place, mask=first, other=0).to(tl.int32)
    value = or_nan(value_of(code, amplitude, BITS, KIND, OUT), bad, CHECK)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=first)
    if BITS == 4:
        rest = place + low
        value = or_nan(value_of(code >> 4, amplitude, BITS, KIND, OUT), bad, CHECK)
        tl.store(out + rest, value.to(out.dtype.element_ty), mask=rest < size)


@triton.jit
def bits_of(v, OUT: tl.constexpr):
    """The bits of floats as integers."""
    if OUT == "fp32":
        v = v.to(tl.int32, bitcast=True)
    else:
        v = v.to(tl.int16, bitcast=True)
    return v


@triton.jit
def compare(
    codes,
    x,
    differs,
    bad,
    size,
    low,
    amplitude,
    BITS: tl.constexpr,
    CHECK: tl.constexpr,
    AMPLITUDE_IS_TENSOR: tl.constexpr,
    KIND: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Set ``differs`` to 1 where a tensor differs from what `decode` would write, in any bit, if there are no NaNs."""
    compared = True
    if CHECK:
        compared = tl.load(bad) == 0
    amplitude = scalar(amplitude, AMPLITUDE_IS_TENSOR)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = place < low
    code = tl.load(codes + place, mask=first, other=0).to(tl.int32)
    value = value_of(code, amplitude, BITS, KIND, OUT).to(x.dtype.element_ty)
    actual = tl.load(x + place, mask=first, other=0.0)
    tl.store(differs + place * 0, 1, mask=first & compared & (bits_of(value, OUT) != bits_of(actual, OUT)))
    if BITS == 4:
        rest = place + low
        second = rest < size
        value = value_of(code >> 4, amplitude, BITS, KIND, OUT).to(x.dtype.element_ty)
        actual = tl.load(x + rest, mask=second, other=0.0)
        tl.store(differs + place * 0, 1, mask=second & compared & (bits_of(value, OUT) != bits_of(actual, OUT)))
