"""Pure tensor functions: rounding, spike counts, weight quantization, the attention product.

Notation: ``T`` time steps, ``B`` images, ``C`` channels, ``H x W`` positions, ``N = H * W`` tokens. In training there
is no time axis: an activation is the number of spikes, ``0..T``, that the converted network fires over its window.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where the mask holds, else 0. `torch.where` and `masked_fill` branch: eight times slower on a CPU."""
    return mask.to(x.dtype).mul_(x)


def _count(drive: Tensor, time_steps: int) -> Tensor:
    return (drive + 0.5).floor_().clamp_(0, time_steps)


class _SpikeCount(torch.autograd.Function):
    """Keeps one bit of information per element for the backward pass (a bool), never the membrane itself."""

    @staticmethod
    def forward(drive: Tensor, time_steps: int) -> Tensor:
        return _count(drive, time_steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        drive, time_steps = inputs
        ctx.save_for_backward((drive > 0) & (drive < time_steps))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return _masked(grad, inside), None


def spike_count(drive: Tensor, time_steps: int) -> Tensor:
    """Number of spikes that a membrane fires within its window: ``clip(floor(drive + 1/2), 0, T)``.

    Halves round up, as an integrate-and-fire neuron that starts at half its threshold does; `torch.round` (half to
    even) gives other counts for the same checkpoint. The gradient is 1 where ``0 < drive < T``, strictly, else 0
    (rectangular straight-through estimator of QSD-Transformer's published code).

    Args:
        drive: accumulated input divided by the threshold, any shape.
        time_steps: T, the most spikes that a neuron can fire.

    Returns:
        Integer-valued counts in ``0..T``, in the dtype and shape of ``drive``. Twice differentiating is an error.
    """
    if not (torch.is_grad_enabled() and drive.requires_grad):
        return _count(drive, time_steps)  # without the mask that only a backward pass needs
    return _SpikeCount.apply(drive, time_steps)


class _LsqQuantize(torch.autograd.Function):
    """The derivative written out: eight times fewer passes over the weights than through autograd's chain."""

    @staticmethod
    def forward(weight: Tensor, step: Tensor, q_min: int, q_max: int, step_gradient_factor: float) -> Tensor:
        return (weight / step).round_().clamp_(q_min, q_max).mul_(step)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int, float], output: Tensor) -> None:
        weight, step, ctx.q_min, ctx.q_max, ctx.step_gradient_factor = inputs
        ctx.save_for_backward(weight, step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        weight, step = ctx.saved_tensors
        scaled = weight / step
        clamped = scaled.clamp(ctx.q_min, ctx.q_max)
        inside = clamped == scaled
        step_gradient = clamped.round() - _masked(scaled, inside)
        step_gradient = (grad * step_gradient).sum(dim=tuple(range(1, grad.dim())), keepdim=True)
        return _masked(grad, inside), step_gradient.mul_(ctx.step_gradient_factor), None, None, None


def lsq_quantize(weight: Tensor, step: Tensor, q_min: int, q_max: int) -> Tensor:
    """Round weights to the grid ``step * {q_min..q_max}`` with a learned step size per output channel.

    Esser et al., "Learned Step Size Quantization" (2020), equations 1 to 5, as QSD-Transformer's published code uses
    it: halves round to even; the step's gradient is scaled by ``1 / sqrt(numel * q_max)`` with the *whole* tensor's
    number of elements although the steps are per channel.

    Args:
        weight: float weights ``[C_out, ...]``.
        step: positive step sizes ``[C_out]``.
        q_min: smallest integer, ``-2**(bits - 1)``.
        q_max: largest integer, ``2**(bits - 1) - 1``.

    Returns:
        Quantized weights in the shape of ``weight``.
    """
    factor = (weight.numel() * q_max) ** -0.5
    return _LsqQuantize.apply(weight, step.view(-1, *[1] * (weight.dim() - 1)), q_min, q_max, factor)


class _LearnedSpikes(torch.autograd.Function):
    """One fused pass each way: the drive is all that is kept beside the output, which the next layer keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int) -> Tensor:
        drive = x / threshold
        output = (drive + 0.5).floor_().clamp_(0, time_steps)
        if amplitude is not None:
            output.mul_(amplitude)
        ctx.time_steps = time_steps
        ctx.save_for_backward(drive, threshold, amplitude, None if amplitude is None else output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        drive, threshold, amplitude, output = ctx.saved_tensors
        # In one pass: the gradient strictly between 0 and T, zero outside.
        inside = torch.ops.aten.hardtanh_backward(grad, drive, 0, ctx.time_steps)
        slope = (1 if amplitude is None else amplitude) / threshold
        threshold_gradient = -_dot(inside, drive) * slope if ctx.needs_input_grad[1] else None
        amplitude_gradient = _dot(grad, output) / amplitude if ctx.needs_input_grad[2] else None
        return inside.mul_(slope), threshold_gradient, amplitude_gradient, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """``(a * b).sum()`` in float32 or better, without the product's memory where that can be avoided."""
    if torch.compiler.is_compiling() or a.dtype in (torch.float16, torch.bfloat16):
        return (a.to(torch.promote_types(a.dtype, torch.float32)) * b).sum()
    order = sorted(range(a.dim()), key=a.stride, reverse=True)  # a view of dense tensors of one memory format
    return torch.dot(a.permute(order).reshape(-1), b.permute(order).reshape(-1))


def learned_spikes(x: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int) -> Tensor:
    """Spike counts for a learned threshold, times a learned amplitude: ``a * clip(floor(x / theta + 1/2), 0, T)``.

    With the amplitude equal to the threshold this is LSQ for activations (Esser et al., 2020, with ``Q_n = 0`` and
    ``Q_p = T``), rounding halves up as an integrate-and-fire neuron does: the gradient of the step is
    ``floor(v + 1/2) - v`` where ``0 < v < T``, strictly, T above and 0 below, ``v = x / step``; that of the input is 1
    inside and 0 outside. The factor of the step's gradient is `scale_gradient`'s. In general the rounding is passed
    straight through, and the derivatives follow.

    Args:
        x: accumulated input, any shape.
        threshold: positive, without dimensions.
        amplitude: without dimensions; equal to the threshold for LSQ; ``None`` for bare counts.
        time_steps: T, the most spikes that a neuron can fire.

    Returns:
        A tensor in the shape and dtype of ``x``. Twice differentiating is an error.
    """
    return _LearnedSpikes.apply(x, threshold, amplitude, time_steps)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` itself, to the bit, with its gradient multiplied by a factor.

    Args:
        x: any tensor.
        factor: of the gradient.
    """
    return _ScaleGradient.apply(x, factor)


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The product ``q (k^T v)`` of spike-driven self-attention, linear in the number of tokens.

    On integer-valued counts the result is an exact integer as long as it stays below 2**24 in float32 (it is at most
    ``N * d_h * T**3``), which is why it never runs in half precision: exact ties at a threshold are common, and the
    sums leave float16's range.

    Args:
        query: ``[B, heads, d_h, N]``, and so are key and value.
        key: see ``query``.
        value: see ``query``.

    Returns:
        ``[B, heads, d_h, N]``, in float32 or better.
    """
    return exact_matmul(exact_matmul(value, key.transpose(-1, -2)), query)


def exact_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32 or better, so that integers up to 2**24 stay exact, whatever autocast wishes.

    Args:
        left: ``[..., I, C]``.
        right: ``[..., C, J]``.
    """
    with torch.autocast(left.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
        return left.to(dtype) @ right.to(dtype)


def pad_frame(x: Tensor, frame: Tensor) -> Tensor:
    """Put one pixel around an image, of a value by channel.

    Args:
        x: ``[B, C, H, W]``.
        frame: ``[C]``; it takes the dtype of ``x``.

    Returns:
        ``[B, C, H + 2, W + 2]``.
    """
    inside = F.pad(x.new_ones(x.shape[-2:], dtype=torch.bool), [1, 1, 1, 1])
    return torch.where(inside, F.pad(x, [1, 1, 1, 1]), frame.to(x.dtype).view(1, -1, 1, 1))


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: in training, drop a whole residual branch per image with probability ``rate``.

    Args:
        x: a residual branch ``[B, ...]``.
        rate: probability in ``[0, 1)``; what is kept is scaled by ``1 / (1 - rate)``.
        training: does nothing if false.

    Returns:
        A tensor of the same shape.
    """
    if rate == 0.0 or not training:
        return x
    keep = torch.empty(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - rate)
    return x * keep.div_(1 - rate)
