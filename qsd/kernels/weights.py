"""Operators of weight quantizers, each one launch of a program of `qsd.kernels.weight_programs`."""

import torch
from torch import Tensor

from qsd.kernels.operators import BLOCK, grid, operator, wrap_triton
from qsd.kernels.switch import KINDS
from qsd.kernels.weight_programs import quantize as quantize_program
from qsd.kernels.weight_programs import quantize_backward as quantize_backward_program
from qsd.rounding import neighbours


def are_rows(weight: Tensor, step: Tensor) -> bool:
    """Whether the memory of each output channel is in one piece, and weights and steps are of one type.

    Args:
        weight: Float weights ``[C_out, ...]``.
        step: Step sizes ``[C_out]``.
    """
    whole = weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    return whole and step.is_contiguous() and weight.dtype == step.dtype


@operator("qsd::quantize")
def quantize(weight: Tensor, step: Tensor, q_min: int, q_max: int, dtype: torch.dtype) -> Tensor:
    """LSQ of weights, see `qsd.lsq.lsq_quantize`, in a type.

    Args:
        weight: Float weights ``[C_out, ...]`` of which `are_rows` holds.
        step: Step sizes ``[C_out]``.
        q_min: Smallest integer of the grid.
        q_max: Largest integer of the grid.
        dtype: Type of the result.
    """
    output, size = torch.empty_like(weight, dtype=dtype), weight.numel()
    wrap_triton(quantize_program)[grid(size)](
        weight,
        step,
        output,
        size,
        size // len(step),
        float(q_min),
        float(q_max),
        KIND=KINDS[weight.dtype],
        OUT=KINDS[dtype],
        BLOCK=BLOCK,
    )
    return output


@operator("qsd::quantize_backward")
def quantize_backward(grad: Tensor, weight: Tensor, step: Tensor, q_min: int, q_max: int) -> tuple[Tensor, Tensor]:
    """The gradients of `quantize` for weights and steps.

    Args:
        grad: Gradient of the quantized weights, in the shape of the weights.
        weight: Float weights ``[C_out, ...]`` of which `are_rows` holds.
        step: Step sizes ``[C_out]``.
        q_min: Smallest integer of the grid.
        q_max: Largest integer of the grid.
    """
    output, step_grad = torch.empty_like(weight), torch.empty_like(step)
    if grad.stride() != output.stride():
        grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
    columns = weight.numel() // len(step)
    wrap_triton(quantize_backward_program)[(len(step),)](
        grad,
        weight,
        step,
        output,
        step_grad,
        columns,
        float(q_min),
        float(q_max),
        *neighbours(q_min, q_max, False),
        (weight.numel() * q_max) ** -0.5,
        KIND=KINDS[weight.dtype],
        BLOCK=min(BLOCK, 2 ** (columns - 1).bit_length()),
    )
    return output, step_grad
