"""Operators of neurons and of codes of counts, each one launch of a program of `qsd.kernels.programs`.

They are registered with PyTorch, so that ``torch.compile`` sees the programs in them. None has a gradient: the
functions that call them do. All tensors are dense and read in the order of their memory, whatever their memory format.
"""

import torch
from torch import Tensor

from qsd.kernels.operators import BLOCK, grid, operator, wrap_triton
from qsd.kernels.programs import compare as compare_program
from qsd.kernels.programs import decode as decode_program
from qsd.kernels.programs import fire as fire_program
from qsd.kernels.programs import pass_codes as pass_codes_program
from qsd.kernels.programs import pass_learned as pass_learned_program
from qsd.kernels.switch import KINDS
from qsd.rounding import learned_slope

# One number, or a tensor without dimensions.
Scalar = float | Tensor


def bytes_of(size: int, bits: int) -> int:
    """The number of bytes of the codes of ``size`` elements."""
    return size - size // 2 if bits == 4 else size


def _split(number: Scalar) -> tuple[float, Tensor | None]:
    """A number, or a tensor without dimensions, as two arguments of an operator."""
    return (1.0, number) if isinstance(number, Tensor) else (float(number), None)


@operator("qsd::fire")
def _fire(
    x: Tensor,
    factor: float,
    factor_tensor: Tensor | None,
    amplitude: float,
    amplitude_tensor: Tensor | None,
    most: float,
    half: float,
    lowest: float,
    highest: float,
    divide: bool,
    half_even: bool,
    bits: int,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output, size = torch.empty_like(x), x.numel()
    if x.stride() != output.stride():
        x = torch.empty_like(x).copy_(x)
    places = bytes_of(size, bits)
    codes = torch.empty(places if bits else 0, dtype=torch.uint8, device=x.device)
    bad = (torch.zeros if check else torch.empty)(int(check), dtype=torch.int32, device=x.device)
    wrap_triton(fire_program)[grid(places)](
        x,
        output,
        codes,
        bad,
        size,
        places,
        factor if factor_tensor is None else factor_tensor,
        amplitude if amplitude_tensor is None else amplitude_tensor,
        most,
        half,
        lowest,
        highest,
        BITS=bits,
        CHECK=check,
        DIVIDE=divide,
        HALF_EVEN=half_even,
        FACTOR_IS_TENSOR=factor_tensor is not None,
        AMPLITUDE_IS_TENSOR=amplitude_tensor is not None,
        KIND=KINDS[x.dtype],
        BLOCK=BLOCK,
    )
    return output, codes, bad


def fire(
    x: Tensor,
    time_steps: int,
    threshold: Scalar | None,
    amplitude: Scalar,
    bounds: tuple[float, float],
    slack: float = 0.0,
    half_even: bool = False,
    bits: int = 0,
    check: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spike counts times an amplitude, and their codes.

    Args:
        x: Accumulated input, with any strides.
        time_steps: T.
        threshold: The divisor of the input; ``None`` for ``1 / T``, as a product with T.
        amplitude: Factor of the counts.
        bounds: The drives between which, strictly, the gradient passes.
        slack: Steps below a threshold that still reach it.
        half_even: Whether halves are rounded to the even count instead of up.
        bits: Bits of a code, 4 or 8; 0 for none.
        check: Whether to look for NaNs.

    Returns:
        The output in the shape, type and strides of ``x``; the codes, uint8; and a number that is not 0 if there are
        NaNs, int32 ``[1]``.
    """
    divisor, divisor_tensor = _split(time_steps if threshold is None else threshold)
    number, tensor = _split(amplitude)
    half = 0.5 + slack if x.dtype == torch.float32 else 0.5
    return _fire(
        x,
        divisor,
        divisor_tensor,
        number,
        tensor,
        float(time_steps),
        half,
        *bounds,
        threshold is not None,
        half_even,
        bits,
        check,
    )


@operator("qsd::pass_codes")
def _pass_codes(
    codes: Tensor,
    grad: Tensor,
    bad: Tensor | None,
    amplitude: float,
    factor: float,
    divide: bool,
    select: bool,
    count_sum: bool,
    bits: int,
) -> tuple[Tensor, Tensor]:
    output, size = torch.empty_like(grad), grad.numel()
    places = bytes_of(size, bits)
    programs = grid(places)
    sums = torch.empty(programs[0] if count_sum else 0, dtype=torch.float32, device=grad.device)
    wrap_triton(pass_codes_program)[programs](
        codes,
        grad,
        output,
        sums,
        codes if bad is None else bad,
        size,
        places,
        amplitude,
        factor,
        BITS=bits,
        CHECK=bad is not None,
        SELECT=select,
        DIVIDE=divide,
        SUM=count_sum,
        KIND=KINDS[grad.dtype],
        BLOCK=BLOCK,
    )
    return output, sums


def pass_fixed(
    codes: Tensor,
    grad: Tensor,
    bits: int,
    time_steps: int,
    threshold: float | None,
    amplitude: float,
    bad: Tensor | None = None,
) -> Tensor:
    """The gradient of a neuron with a fixed threshold.

    Args:
        codes: Codes of the neuron's output.
        grad: Gradient of the output, dense, in the order of the codes.
        bits: Bits of a code.
        time_steps: T.
        threshold: Threshold of the forward pass, or ``None``.
        amplitude: Amplitude of the forward pass.
        bad: Whether the input had NaNs, see `fire`: then the whole gradient is NaN. ``None`` if it had none.
    """
    factor = float(time_steps if threshold is None else threshold)
    return _pass_codes(codes, grad, bad, float(amplitude), factor, threshold is not None, False, False, bits)[0]


def pass_masked(
    codes: Tensor, grad: Tensor, bits: int, blocks_nan: bool, count_sum: bool, bad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradient where it passes, else 0, and the sum of gradient times count over all elements.

    Args:
        codes: Codes of the neuron's output.
        grad: Gradient of the output, dense, in the order of the codes.
        bits: Bits of a code.
        blocks_nan: Whether a gradient of NaN is 0 where it does not pass.
        count_sum: Whether the sum is needed; it is 0 otherwise.
        bad: As of `pass_fixed`.
    """
    passed, sums = _pass_codes(codes, grad, bad, 1.0, 1.0, False, blocks_nan, count_sum, bits)
    return passed, total(sums)


def total(sums: Tensor) -> Tensor:
    """The sum over the programs, the last dimension, in float32."""
    return sums.sum(-1, dtype=torch.float64).to(torch.float32)


@operator("qsd::pass_learned")
def _pass_learned(
    x: Tensor, grad: Tensor, threshold: Tensor, amplitude: Tensor | None, most: float, is_step: bool
) -> tuple[Tensor, Tensor]:
    output = torch.empty_like(grad)
    programs = grid(grad.numel())
    sums = torch.empty(1 if is_step else 2, programs[0], dtype=torch.float32, device=grad.device)
    wrap_triton(pass_learned_program)[programs](
        x,
        grad,
        output,
        sums,
        grad.numel(),
        threshold,
        1.0 if amplitude is None else amplitude,
        most,
        AMPLITUDE_IS_TENSOR=amplitude is not None,
        IS_STEP=is_step,
        KIND=KINDS[grad.dtype],
        BLOCK=BLOCK,
    )
    return output, sums


def pass_learned(
    x: Tensor, grad: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of a neuron with a learned threshold: of input, threshold and amplitude.

    Args:
        x: Input of the neuron, dense.
        grad: Gradient of the output, with the strides of ``x``.
        threshold: Threshold of the forward pass, without dimensions.
        amplitude: Amplitude of the forward pass, or ``None``. If it is the threshold itself, a step, the threshold's
            gradient is that of both.
        time_steps: T.
    """
    slope = learned_slope(threshold, amplitude)
    passed, sums = _pass_learned(x, grad, threshold, amplitude, float(time_steps), slope is None)
    totals = total(sums).unbind()
    if slope is None:
        return passed, totals[0], None
    return passed, totals[0] * slope, None if amplitude is None else totals[1]


@operator("qsd::decode")
def _decode(
    codes: Tensor,
    size: int,
    bad: Tensor | None,
    amplitude: float,
    amplitude_tensor: Tensor | None,
    bits: int,
    kind: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    output, places = torch.empty(size, dtype=dtype, device=codes.device), bytes_of(size, bits)
    wrap_triton(decode_program)[grid(places)](
        codes,
        output,
        codes if bad is None else bad,
        size,
        places,
        amplitude if amplitude_tensor is None else amplitude_tensor,
        BITS=bits,
        CHECK=bad is not None,
        AMPLITUDE_IS_TENSOR=amplitude_tensor is not None,
        KIND=KINDS[kind],
        OUT=KINDS[dtype],
        BLOCK=BLOCK,
    )
    return output


def decode(
    codes: Tensor,
    size: int,
    bits: int,
    amplitude: Scalar,
    kind: torch.dtype,
    dtype: torch.dtype,
    bad: Tensor | None = None,
) -> Tensor:
    """The neuron's output ``[size]`` in the order of memory.

    Args:
        codes: Codes, uint8.
        size: Number of elements.
        bits: Bits of a code.
        amplitude: Factor of the counts.
        kind: Type in which counts and amplitude are multiplied.
        dtype: Type of the result.
        bad: Whether the input had NaNs, see `fire`: then all values are NaN. ``None`` if it had none.
    """
    return _decode(codes, size, bad, *_split(amplitude), bits, kind, dtype)


@operator("qsd::compare")
def _compare(
    codes: Tensor,
    x: Tensor,
    bad: Tensor | None,
    amplitude: float,
    amplitude_tensor: Tensor | None,
    bits: int,
    kind: torch.dtype,
) -> Tensor:
    differs, places = torch.zeros(1, dtype=torch.int32, device=x.device), bytes_of(x.numel(), bits)
    wrap_triton(compare_program)[grid(places)](
        codes,
        x,
        differs,
        codes if bad is None else bad,
        x.numel(),
        places,
        amplitude if amplitude_tensor is None else amplitude_tensor,
        BITS=bits,
        CHECK=bad is not None,
        AMPLITUDE_IS_TENSOR=amplitude_tensor is not None,
        KIND=KINDS[kind],
        OUT=KINDS[x.dtype],
        BLOCK=BLOCK,
    )
    return differs


def difference(
    codes: Tensor, x: Tensor, bits: int, amplitude: Scalar, kind: torch.dtype, bad: Tensor | None = None
) -> Tensor:
    """A number, int32 ``[1]``, that is not 0 if a tensor has other bits than the neuron's output.

    Args:
        codes: Codes, uint8.
        x: Dense tensor, in the order of the codes.
        bits: Bits of a code.
        amplitude: Factor of the counts.
        kind: Type in which counts and amplitude were multiplied.
        bad: Whether the neuron's input had NaNs, see `fire`: then nothing is compared. ``None`` if it had none.
    """
    return _compare(codes, x, bad, *_split(amplitude), bits, kind)
