"""Neurons that keep codes of their output for the backward pass, and leave them to the layers that they feed."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsd import functional
from qsd.functional import (
    HALF_UP,
    CountRule,
    dot,
    fixed_drive,
    learned_gradients,
    passes,
    times_slope,
)
from qsd.lean.codes import fire
from qsd.lean.memory import dense, flat
from qsd.lean.operands import CODES, GRADIENTS, Codes, NormGradients, norm_origin
from qsd.rounding import learned_slope, slope


class _FixedSpikes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, time_steps: int, threshold: float | None, amplitude: float, rule: CountRule
    ) -> Tensor:
        output, ctx.layout, packed = fire(x, time_steps, threshold, amplitude, rule)
        ctx.neuron = time_steps, threshold, amplitude
        ctx.shape, ctx.stride, ctx.has_codes = output.shape, output.stride(), packed is not None
        if packed is None:
            packed = passes(fixed_drive(x, time_steps, threshold), time_steps, rule.closed)
        else:
            CODES[output.untyped_storage()] = Codes(ctx.layout, packed, output._version)
        ctx.save_for_backward(packed)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (saved,) = ctx.saved_tensors
        if ctx.has_codes:
            grad = dense(grad, ctx.stride)
            if ctx.layout.in_kernels():
                from qsd.kernels import neurons

                neuron = (*slope(*ctx.neuron), ctx.layout.bad)
                return neurons.pass_fixed(saved, grad, ctx.layout.bits, *neuron), None, None, None, None
            passed = ctx.layout.masked(saved, flat(grad))[0].as_strided(ctx.shape, ctx.stride)
        else:
            passed = saved.to(grad.dtype).mul_(grad)
        return times_slope(passed, *slope(*ctx.neuron)), None, None, None, None


def fixed_spikes(
    x: Tensor, time_steps: int, threshold: float | None, amplitude: float, rule: CountRule = HALF_UP
) -> Tensor:
    """`qsd.functional.fixed_spikes`, with the same gradients, from codes of half a byte.

    Args:
        x: Accumulated input, any shape.
        time_steps: T, the most spikes that a neuron can fire.
        threshold: Threshold in units of the input; ``None`` for ``1 / T``, as a product with T.
        amplitude: Factor of the counts.
        rule: Rounding of halves, and the window of the gradient.

    Returns:
        A tensor in the shape and dtype of ``x``. Twice differentiating is an error.
    """
    if time_steps > 127 or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return functional.fixed_spikes(x, time_steps, threshold, amplitude, rule)
    return _FixedSpikes.apply(x, time_steps, threshold, amplitude, rule)


class _LearnedSpikes(torch.autograd.Function):
    r"""`qsd.functional.learned_spikes` from codes of half a byte.

    The threshold's gradient is ``-sum(g x)`` over its square, times the amplitude, with the gradient g where it passes.
    Where x is a batch norm's output, ``x = gamma xhat + beta``, the sum is that of ``gamma * dgamma + beta * dbeta``,
    with the norm's own parameter gradients for g: they follow from tensors that the norm keeps. Elsewhere x itself has
    to be kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int) -> Tensor:
        origin = norm_origin(x) if ctx.needs_input_grad[1] else None  # first: it leaves the beginning in the cache
        # Copies, which a step of the optimizer or a change through ``.data`` leaves alone.
        copy = threshold.clone()
        ctx.steps = copy, copy if amplitude is threshold else None if amplitude is None else amplitude.clone()
        output, ctx.layout, packed = fire(x, time_steps, copy, 1.0 if ctx.steps[1] is None else ctx.steps[1])
        ctx.time_steps, ctx.shape, ctx.stride = time_steps, output.shape, output.stride()
        ctx.has_codes, ctx.eps = packed is not None, None
        if packed is None:
            ctx.save_for_backward(x)
            return output
        CODES[output.untyped_storage()] = Codes(ctx.layout, packed, output._version)
        kept: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[1]:
            kept, ctx.eps = ((x,), None) if origin is None else (origin[:5], origin.eps)
            ctx.call = None if origin is None or origin.var is not None else origin.call
        ctx.save_for_backward(packed, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        threshold, amplitude = ctx.steps
        if not ctx.has_codes:
            drive = ctx.saved_tensors[0] / threshold
            needed = ctx.needs_input_grad
            return *learned_gradients(grad, drive, threshold, amplitude, ctx.time_steps, needed), None
        packed, *kept = ctx.saved_tensors
        grad = dense(grad, ctx.stride)
        if ctx.eps is None and kept and ctx.layout.in_kernels():
            from qsd.kernels import neurons

            return *neurons.pass_learned(dense(kept[0], ctx.stride), grad, threshold, amplitude, ctx.time_steps), None
        passed, amplitude_gradient = _passed(ctx, packed, grad)
        factor = learned_slope(threshold, amplitude)
        passed = passed if factor is None else passed.mul_(factor)
        threshold_gradient = None
        if kept:
            total = dot(passed, kept[0]) if ctx.eps is None else _dot_with_norm(passed, ctx.eps, ctx.call, *kept)
            threshold_gradient = -total / threshold
        return passed, threshold_gradient, amplitude_gradient, None


def _passed(ctx: Any, packed: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient where it passes, before the factor of the neuron, and the amplitude's gradient if it is needed."""
    needed = ctx.needs_input_grad[2]
    if ctx.layout.in_kernels():
        from qsd.kernels import neurons

        passed, amplitude_gradient = neurons.pass_masked(packed, grad, ctx.layout.bits, True, needed, ctx.layout.bad)
        return passed, amplitude_gradient if needed else None
    passed, amplitude_gradient = ctx.layout.masked(packed, flat(grad), blocks_nan=True, totals=needed)
    return passed.as_strided(ctx.shape, ctx.stride), amplitude_gradient


def _dot_with_norm(
    grad: Tensor, eps: float, call: object, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor
) -> Tensor:
    """The sum of a gradient times a batch norm's output, by the tensors of its `NormOrigin`.

    It follows from sums that the norm's own backward pass needs, too. So that of a known call is computed here.
    """
    mask = [call is not None and x.requires_grad, True, True]
    x_grad, weight_grad, bias_grad = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, inverse, True, eps, mask
    )
    if call is not None:
        gradients = x_grad if mask[0] else None, weight_grad, bias_grad
        GRADIENTS[grad.untyped_storage()] = NormGradients(call, grad._version, gradients)
    return (weight_grad * weight + bias_grad * bias).sum()


def learned_spikes(x: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int) -> Tensor:
    """`qsd.functional.learned_spikes` from codes of half a byte.

    Gradients are the same bits but for those of threshold and amplitude, whose sums run in another order.

    Args:
        x: Accumulated input, any shape.
        threshold: Positive, without dimensions.
        amplitude: Without dimensions; equal to the threshold for LSQ; ``None`` for bare counts.
        time_steps: T, the most spikes that a neuron can fire.

    Returns:
        A tensor in the shape and dtype of ``x``. Twice differentiating is an error.
    """
    if time_steps > 127 or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return functional.learned_spikes(x, threshold, amplitude, time_steps)
    return _LearnedSpikes.apply(x, threshold, amplitude, time_steps)
