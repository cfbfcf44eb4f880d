"""Operators of neurons and of codes of counts, each one launch of a program of `qsd.kernels.programs`.

They are registered with PyTorch, so that ``torch.compile`` sees the programs in them. None has a gradient: the
functions that call them do. All tensors are dense and read in the order of their memory, whatever their memory format.
"""

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qsd.kernels.programs import compare as compare_program
from qsd.kernels.programs import decode as decode_program
from qsd.kernels.programs import fire as fire_program
from qsd.kernels.programs import pass_codes as pass_codes_program
from qsd.kernels.programs import pass_learned as pass_learned_program
from qsd.kernels.switch import KINDS

# One number, or a tensor without dimensions.
Scalar = float | Tensor
# Places of a program: bytes of codes, else elements.
BLOCK = 1024


def bytes_of(size: int, bits: int) -> int:
    """The number of bytes of the codes of ``size`` elements."""
    return size - size // 2 if bits == 4 else size


def _grid(places: int) -> tuple[int]:
    return (-(-places // BLOCK),)


def _split(number: Scalar) -> tuple[float, Tensor | None]:
    """A number, or a tensor without dimensions, as two arguments of an operator."""
    return (1.0, number) if isinstance(number, Tensor) else (float(number), None)


@triton_op("qsd::fire", mutates_args=())
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
    bad = torch.zeros(1 if check else 0, dtype=torch.int32, device=x.device)
    wrap_triton(fire_program)[_grid(places)](
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


@triton_op("qsd::pass_codes", mutates_args=())
def _pass_codes(
    codes: Tensor, grad: Tensor, amplitude: float, factor: float, divide: bool, select: bool, count_sum: bool, bits: int
) -> tuple[Tensor, Tensor]:
    output, size = torch.empty_like(grad), grad.numel()
    places = bytes_of(size, bits)
    grid = _grid(places)
    sums = torch.empty(grid[0] if count_sum else 0, dtype=torch.float32, device=grad.device)
    wrap_triton(pass_codes_program)[grid](
        codes,
        grad,
        output,
        sums,
        size,
        places,
        amplitude,
        factor,
        BITS=bits,
        SELECT=select,
        DIVIDE=divide,
        SUM=count_sum,
        KIND=KINDS[grad.dtype],
        BLOCK=BLOCK,
    )
    return output, sums


def pass_fixed(
    codes: Tensor, grad: Tensor, bits: int, time_steps: int, threshold: float | None, amplitude: float
) -> Tensor:
    """The gradient of a neuron with a fixed threshold.

    Args:
        codes: Codes of the neuron's output.
        grad: Gradient of the output, dense, in the order of the codes.
        bits: Bits of a code.
        time_steps: T.
        threshold: Threshold of the forward pass, or ``None``.
        amplitude: Amplitude of the forward pass.
    """
    factor = float(time_steps if threshold is None else threshold)
    return _pass_codes(codes, grad, float(amplitude), factor, threshold is not None, False, False, bits)[0]


def pass_masked(codes: Tensor, grad: Tensor, bits: int, blocks_nan: bool, count_sum: bool) -> tuple[Tensor, Tensor]:
    """The gradient where it passes, else 0, and the sum of gradient times count over all elements.

    Args:
        codes: Codes of the neuron's output.
        grad: Gradient of the output, dense, in the order of the codes.
        bits: Bits of a code.
        blocks_nan: Whether a gradient of NaN is 0 where it does not pass.
        count_sum: Whether the sum is needed; it is 0 otherwise.
    """
    passed, sums = _pass_codes(codes, grad, 1.0, 1.0, False, blocks_nan, count_sum, bits)
    return passed, total(sums)


def total(sums: Tensor) -> Tensor:
    """The sum over the programs, the last dimension, in float32."""
    return sums.sum(-1, dtype=torch.float64).to(torch.float32)


@triton_op("qsd::pass_learned", mutates_args=())
def _pass_learned(
    x: Tensor, grad: Tensor, threshold: Tensor, amplitude: Tensor | None, most: float
) -> tuple[Tensor, Tensor]:
    output = torch.empty_like(grad)
    grid = _grid(grad.numel())
    sums = torch.empty(2, grid[0], dtype=torch.float32, device=grad.device)
    wrap_triton(pass_learned_program)[grid](
        x,
        grad,
        output,
        sums,
        grad.numel(),
        threshold,
        1.0 if amplitude is None else amplitude,
        most,
        AMPLITUDE_IS_TENSOR=amplitude is not None,
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
        amplitude: Amplitude of the forward pass, or ``None``.
        time_steps: T.
    """
    passed, sums = _pass_learned(x, grad, threshold, amplitude, float(time_steps))
    by_drive, by_count = total(sums).unbind()
    slope = (1 if amplitude is None else amplitude) / threshold
    return passed, -by_drive * slope, None if amplitude is None else by_count


@triton_op("qsd::decode", mutates_args=())
def _decode(
    codes: Tensor,
    size: int,
    amplitude: float,
    amplitude_tensor: Tensor | None,
    bits: int,
    kind: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    output, places = torch.empty(size, dtype=dtype, device=codes.device), bytes_of(size, bits)
    wrap_triton(decode_program)[_grid(places)](
        codes,
        output,
        size,
        places,
        amplitude if amplitude_tensor is None else amplitude_tensor,
        BITS=bits,
        AMPLITUDE_IS_TENSOR=amplitude_tensor is not None,
        KIND=KINDS[kind],
        OUT=KINDS[dtype],
        BLOCK=BLOCK,
    )
    return output


def decode(codes: Tensor, size: int, bits: int, amplitude: Scalar, kind: torch.dtype, dtype: torch.dtype) -> Tensor:
    """The neuron's output ``[size]`` in the order of memory.

    Args:
        codes: Codes, uint8.
        size: Number of elements.
        bits: Bits of a code.
        amplitude: Factor of the counts.
        kind: Type in which counts and amplitude are multiplied.
        dtype: Type of the result.
    """
    return _decode(codes, size, *_split(amplitude), bits, kind, dtype)


@triton_op("qsd::compare", mutates_args=())
def _compare(
    codes: Tensor, x: Tensor, amplitude: float, amplitude_tensor: Tensor | None, bits: int, kind: torch.dtype
) -> Tensor:
    bad, places = torch.zeros(1, dtype=torch.int32, device=x.device), bytes_of(x.numel(), bits)
    wrap_triton(compare_program)[_grid(places)](
        codes,
        x,
        bad,
        x.numel(),
        places,
        amplitude if amplitude_tensor is None else amplitude_tensor,
        BITS=bits,
        AMPLITUDE_IS_TENSOR=amplitude_tensor is not None,
        KIND=KINDS[kind],
        OUT=KINDS[x.dtype],
        BLOCK=BLOCK,
    )
    return bad


def matches(codes: Tensor, x: Tensor, bits: int, amplitude: Scalar, kind: torch.dtype) -> bool:
    """Whether a tensor has the bits of the neuron's output.

    Args:
        codes: Codes, uint8.
        x: Dense tensor, in the order of the codes.
        bits: Bits of a code.
        amplitude: Factor of the counts.
        kind: Type in which counts and amplitude were multiplied.
    """
    return _compare(codes, x, *_split(amplitude), bits, kind).item() == 0
