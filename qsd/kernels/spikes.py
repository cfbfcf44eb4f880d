"""Neurons whose forward and backward pass are one kernel each, see `qsd.functional` for what they compute."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsd.kernels.neurons import Scalar, fire, pass_fixed, pass_learned
from qsd.rounding import slope, window


def code_bits(time_steps: int) -> int:
    """Bits of a code: a count and whether the gradient passes.

    Args:
        time_steps: T, at most 127.
    """
    return 4 if time_steps <= 7 else 8


def same_order(x: Tensor, like: Tensor) -> Tensor:
    """A tensor, or its copy with the strides of another one if it has others.

    Args:
        x: Any tensor.
        like: Dense tensor of the same shape.
    """
    return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)


class _FixedSpikes(torch.autograd.Function):
    """Keeps half a byte per element for the backward pass, a byte for more than seven time steps."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        time_steps: int,
        threshold: float | None,
        amplitude: float,
        half_even: bool,
        closed: bool,
        slack: float,
    ) -> Tensor:
        bounds, ctx.bits = window(x.dtype, time_steps, closed), code_bits(time_steps)
        output, codes, _ = fire(x, time_steps, threshold, amplitude, bounds, slack, half_even, ctx.bits)
        ctx.neuron = time_steps, threshold, amplitude
        ctx.shape, ctx.stride = output.shape, output.stride()
        ctx.save_for_backward(codes)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        if grad.stride() != ctx.stride:
            grad = grad.new_empty_strided(ctx.shape, ctx.stride).copy_(grad)
        return pass_fixed(codes, grad, ctx.bits, *slope(*ctx.neuron)), *[None] * 6


def fixed_spikes(
    x: Tensor,
    time_steps: int,
    threshold: float | None,
    amplitude: float,
    half_even: bool,
    closed: bool,
    slack: float | None,
) -> Tensor:
    """`qsd.functional.fixed_spikes` by kernels.

    Args:
        x: Accumulated input, any shape.
        time_steps: T, at most 127.
        threshold: Threshold in units of the input; ``None`` for ``1 / T``, as a product with T.
        amplitude: Factor of the counts.
        half_even: Whether halves are rounded to the even count instead of up.
        closed: Whether the gradient passes at 0 and T, too.
        slack: Steps below a threshold that still reach it.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _FixedSpikes.apply(x, time_steps, threshold, amplitude, half_even, closed, slack or 0.0)
    return fire(x, time_steps, threshold, amplitude, (0, time_steps), slack or 0.0, half_even)[0]


class _LearnedSpikes(torch.autograd.Function):
    """Keeps the input, and divides it again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int) -> Tensor:
        factor: Scalar = 1.0 if amplitude is None else amplitude
        output = fire(x, time_steps, threshold, factor, (0, time_steps))[0]
        ctx.time_steps, ctx.is_step = time_steps, amplitude is threshold
        # Copies of the step sizes, which a later change of the parameters does not reach.
        other = None if amplitude is None or ctx.is_step else amplitude.clone()
        ctx.save_for_backward(same_order(x, output), threshold.clone(), other)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, threshold, other = ctx.saved_tensors
        amplitude = threshold if ctx.is_step else other
        gradients = pass_learned(x, same_order(grad, x), threshold, amplitude, ctx.time_steps)
        return *[g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad)], None


def learned_spikes(x: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int) -> Tensor:
    """`qsd.functional.learned_spikes` by kernels.

    Args:
        x: Accumulated input, any shape.
        threshold: Positive, float32, without dimensions.
        amplitude: The same; ``None`` for bare counts.
        time_steps: T, at most 127.
    """
    return _LearnedSpikes.apply(x, threshold, amplitude, time_steps)
