"""Learned step size quantization (LSQ) of weights: pure tensor functions."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsd.kernels import switch
from qsd.rounding import neighbours


class _LsqQuantize(torch.autograd.Function):
    """The derivative written out: eight times fewer passes over the weights than through autograd's chain.

    Without a method `setup_context`: PyTorch inspects the signature of functions with one in each call, for 0.1 ms.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, q_min: int, q_max: int) -> Tensor:
        ctx.q_min, ctx.q_max = q_min, q_max
        ctx.save_for_backward(weight, step)
        return lsq_values(weight, step, q_min, q_max, torch.promote_types(weight.dtype, step.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight, step = ctx.saved_tensors
        return *lsq_backward(grad, weight, step, ctx.q_min, ctx.q_max), None, None


def lsq_backward(grad: Tensor, weight: Tensor, step: Tensor, q_min: int, q_max: int) -> tuple[Tensor, Tensor]:
    """The gradients of `lsq_quantize` for float weights and steps.

    Args:
        grad: Gradient of the quantized weights.
        weight: Float weights ``[C_out, ...]``.
        step: Step sizes ``[C_out]``.
        q_min: Smallest integer of the grid.
        q_max: Largest integer of the grid.
    """
    if switch.devices and switch.computes(weight):
        from qsd.kernels import weights

        if weights.are_rows(weight, step):
            return weights.quantize_backward(grad, weight, step, q_min, q_max)
    scaled, integers = lsq_grid(weight, step, q_min, q_max)
    return lsq_gradients(grad, scaled, integers, q_min, q_max)


def lsq_values(weight: Tensor, step: Tensor, q_min: int, q_max: int, dtype: torch.dtype) -> Tensor:
    """`lsq_quantize` without a gradient, in the memory of the result.

    Args:
        weight: Float weights ``[C_out, ...]``.
        step: Step sizes ``[C_out]``.
        q_min: Smallest integer of the grid.
        q_max: Largest integer of the grid.
        dtype: Type of the result.
    """
    if switch.devices and switch.computes(weight):
        from qsd.kernels import weights

        if weights.are_rows(weight, step):
            return weights.quantize(weight, step, q_min, q_max, dtype)
    step = step.view(-1, *[1] * (weight.dim() - 1))
    values = (weight / step).clamp_(q_min, q_max).round_()
    # Compiled by PyTorch 2.11, a Function whose output was changed in place or has a second name gives no gradient.
    values = values * step if torch.compiler.is_compiling() else values.mul_(step)
    return values if values.dtype == dtype else values.to(dtype)


def lsq_grid(weight: Tensor, step: Tensor, q_min: int, q_max: int) -> tuple[Tensor, Tensor]:
    """The intermediate results of `lsq_quantize` that `lsq_gradients` needs.

    Args:
        weight: Float weights ``[C_out, ...]``.
        step: Step sizes ``[C_out]``.
        q_min: Smallest integer of the grid.
        q_max: Largest integer of the grid.

    Returns:
        The weights in steps, and the integers on the grid.
    """
    scaled = weight / step.view(-1, *[1] * (weight.dim() - 1))
    return scaled, scaled.clamp(q_min, q_max).round_()


def on_grid(integers: Tensor, step: Tensor) -> Tensor:
    """The weights of integers on the grid, in the type of the steps.

    Args:
        integers: ``[C_out, ...]``.
        step: Step sizes by output channel, ``[C_out]``.
    """
    return integers.to(step.dtype) * step.view(-1, *[1] * (integers.dim() - 1))


def lsq_gradients(grad: Tensor, scaled: Tensor, integers: Tensor, q_min: int, q_max: int) -> tuple[Tensor, Tensor]:
    """The gradients of `lsq_quantize` for float weights and steps.

    Args:
        grad: Gradient of the quantized weights.
        scaled: Weights in steps, from `lsq_grid`.
        integers: Integers on the grid, from `lsq_grid`; overwritten.
        q_min: Smallest integer of the grid.
        q_max: Largest integer of the grid.
    """
    # Both ends of the grid pass the gradient; a hard tanh, which masks in one pass, would stop it there.
    below, above = neighbours(q_min, q_max, scaled.dtype == torch.float64)
    passed = torch.ops.aten.hardtanh_backward(grad, scaled, below, above)
    by_element = integers.mul_(grad).addcmul_(passed, scaled, value=-1)
    factor = (scaled.numel() * q_max) ** -0.5
    return passed, by_element.sum(dim=tuple(range(1, grad.dim()))).mul_(factor)


def lsq_quantize(weight: Tensor, step: Tensor, q_min: int, q_max: int) -> Tensor:
    """Round weights to the grid ``step * {q_min..q_max}`` with a learned step size per output channel.

    Esser et al., "Learned Step Size Quantization" (2020), equations 1 to 5, as QSD-Transformer's published code uses
    it: halves round to even; the step's gradient is scaled by ``1 / sqrt(numel * q_max)`` with the *whole* tensor's
    number of elements although the steps are per channel.

    Args:
        weight: Float weights ``[C_out, ...]``.
        step: Positive step sizes ``[C_out]``.
        q_min: Smallest integer, ``-2**(bits - 1)``.
        q_max: Largest integer, ``2**(bits - 1) - 1``.

    Returns:
        Quantized weights in the shape of ``weight``.
    """
    return _LsqQuantize.apply(weight, step, q_min, q_max)
