"""Pure tensor functions: rounding, spike counts, weight quantization, the attention product.

Notation: ``T`` time steps, ``B`` images, ``C`` channels, ``H x W`` positions, ``N = H * W`` tokens. In training there
is no time axis: an activation is the number of spikes, ``0..T``, that the converted network fires over its window.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qsd.spike_codes import Kept, Layout, NormOrigin, Spikes, attach, code_bits, encode, norm_of, spikes_of, viewed


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where the mask holds, else 0. `torch.where` and `masked_fill` branch: eight times slower on a CPU."""
    return mask.to(x.dtype).mul_(x)


def _count(drive: Tensor, time_steps: int) -> Tensor:
    if torch.compiler.is_compiling():
        # Compiled by PyTorch 2.11, a Function whose output was changed in place has no gradient.
        return (drive + 0.5).floor().clamp(0, time_steps)
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


class _FixedSpikes(torch.autograd.Function):
    """`_SpikeCount` between two factors; half a byte per element, shared with the layer behind, is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, time_steps: int, threshold: float | None, amplitude: float
    ) -> tuple[Tensor, Tensor, Layout]:
        drive = _drive(x, time_steps, threshold)
        counts = _count(drive, time_steps)
        codes, layout = encode(counts, *_flags_(drive, time_steps))
        ctx.time_steps, ctx.threshold, ctx.amplitude, ctx.layout = time_steps, threshold, amplitude, layout
        ctx.save_for_backward(codes)
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        return (counts if amplitude == 1 else counts.mul_(amplitude)), codes, layout

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        (codes,) = ctx.saved_tensors
        passed = ctx.layout.inside(codes).mul_(grad)
        if ctx.amplitude != 1:
            passed.mul_(ctx.amplitude)
        passed = passed.mul_(ctx.time_steps) if ctx.threshold is None else passed.div_(ctx.threshold)
        return passed, None, None, None


def _drive(x: Tensor, time_steps: int, threshold: float | None) -> Tensor:
    return x * time_steps if threshold is None else x / threshold


def _flags_(drive: Tensor, time_steps: int) -> tuple[Tensor, int]:
    """The codes' highest bit where ``0 < drive < T``, strictly, else 0, in place of the drive; and the codes' bits.

    A hard tanh's gradient is that in one pass over floats; comparisons are slow on a CPU.
    """
    bits = code_bits(time_steps)
    highest = drive.new_full((), 2 ** (bits - 1))
    return torch.ops.aten.hardtanh_backward.grad_input(highest, drive, 0, time_steps, grad_input=drive), bits


def fixed_spikes(x: Tensor, time_steps: int, threshold: float | None, amplitude: float, lean: bool = True) -> Tensor:
    """Spike counts of a neuron with a fixed threshold, times an amplitude; see `spike_count`.

    Args:
        x: accumulated input, any shape.
        time_steps: T, the most spikes that a neuron can fire.
        threshold: what one spike is worth in units of the input; ``None`` for ``1 / T``, as a product with T.
        amplitude: what one spike adds to the output.
        lean: keep codes of half a byte for the backward pass, and leave them to the layer behind, which would else
            keep floats. Gradients are the same bits. T above 127 has no codes.

    Returns:
        A tensor in the shape and dtype of ``x``. Twice differentiating is an error.
    """
    if not (lean and _keeps(time_steps)):
        counts = spike_count(_drive(x, time_steps, threshold), time_steps)
        return counts if amplitude == 1 else counts * amplitude
    output, codes, layout = _FixedSpikes.apply(x, time_steps, threshold, amplitude)
    return attach(output, codes, amplitude, layout)


def _keeps(time_steps: int) -> bool:
    """Whether codes pay: not without a backward pass, nor under a compiler, which decides itself what is kept."""
    return torch.is_grad_enabled() and time_steps <= 127 and not torch.compiler.is_compiling()


class _LsqQuantize(torch.autograd.Function):
    """The derivative written out: eight times fewer passes over the weights than through autograd's chain."""

    @staticmethod
    def forward(weight: Tensor, step: Tensor, q_min: int, q_max: int) -> Tensor:
        return lsq_grid(weight, step, q_min, q_max)[2]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
        weight, step, ctx.q_min, ctx.q_max = inputs
        ctx.save_for_backward(weight, step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight, step = ctx.saved_tensors
        scaled, integers, _ = lsq_grid(weight, step, ctx.q_min, ctx.q_max)
        return *lsq_gradients(grad, scaled, integers, ctx.q_min, ctx.q_max), None, None


def lsq_grid(weight: Tensor, step: Tensor, q_min: int, q_max: int) -> tuple[Tensor, Tensor, Tensor]:
    """`lsq_quantize` without a gradient, and what `lsq_gradients` needs.

    Args:
        weight: see there.
        step: see there.
        q_min: see there.
        q_max: see there.

    Returns:
        The weights in steps, the integers on the grid, and the quantized weights.
    """
    step = step.view(-1, *[1] * (weight.dim() - 1))
    scaled = weight / step
    integers = scaled.clamp(q_min, q_max).round_()
    return scaled, integers, integers * step


def lsq_gradients(grad: Tensor, scaled: Tensor, integers: Tensor, q_min: int, q_max: int) -> tuple[Tensor, Tensor]:
    """The gradients of `lsq_quantize` for float weights and steps.

    Args:
        grad: of the quantized weights.
        scaled: see `lsq_grid`.
        integers: see there; overwritten.
        q_min: see `lsq_quantize`.
        q_max: see there.
    """
    # Both ends of the grid pass the gradient; a hard tanh, which masks in one pass, would stop it there.
    kind = np.float64 if scaled.dtype == torch.float64 else np.float32
    below, above = np.nextafter(kind(q_min), kind(-np.inf)), np.nextafter(kind(q_max), kind(np.inf))
    passed = torch.ops.aten.hardtanh_backward(grad, scaled, float(below), float(above))
    by_element = integers.mul_(grad).addcmul_(passed, scaled, value=-1)
    factor = (scaled.numel() * q_max) ** -0.5
    return passed, by_element.sum(dim=tuple(range(1, grad.dim()))).mul_(factor)


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
    return _LsqQuantize.apply(weight, step, q_min, q_max)


class _LearnedSpikes(torch.autograd.Function):
    """One fused pass each way: the drive is all that is kept beside the output, which the next layer keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int) -> Tensor:
        drive = x / threshold
        output = _count(drive, time_steps)
        if amplitude is not None:
            output = output * amplitude  # not in place, see `_count`
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


class _LeanLearnedSpikes(torch.autograd.Function):
    r"""The same from codes of half a byte.

    The threshold's gradient is ``-sum(g x)`` over its square, times the amplitude, with the gradient g inside. Where x
    is a batch norm's output, ``x = gamma xhat + beta``, the sum is that of ``gamma * dgamma + beta * dbeta``, the
    norm's own parameter gradients for g: they follow from what the norm keeps. Elsewhere x itself has to be kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int, origin: NormOrigin | None
    ) -> tuple[Tensor, Tensor, Layout]:
        drive = x / threshold
        counts = _count(drive, time_steps)
        codes, ctx.layout = encode(counts, *_flags_(drive, time_steps))
        kept = (x,) if origin is None else origin.tensors
        ctx.eps = None if origin is None else origin.eps
        ctx.save_for_backward(codes, threshold, amplitude, *(kept if ctx.needs_input_grad[1] else ()))
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        return (counts if amplitude is None else counts.mul_(amplitude)), codes, ctx.layout

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        codes, threshold, amplitude, *kept = ctx.saved_tensors
        amplitude_gradient = _dot(grad, ctx.layout.counts(codes)) if ctx.needs_input_grad[2] else None
        inside = ctx.layout.inside(codes).mul_(grad)
        slope = (1 if amplitude is None else amplitude) / threshold
        threshold_gradient = None
        if kept:
            total = _dot(inside, kept[0]) if len(kept) == 1 else _dot_with_norm(inside, ctx.eps, *kept)
            threshold_gradient = -total / threshold * slope
        return inside.mul_(slope), threshold_gradient, amplitude_gradient, None, None


def _dot_with_norm(
    grad: Tensor, eps: float, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor
) -> Tensor:
    """The sum of a gradient times a batch norm's output, by the tensors of its origin."""
    _, weight_gradient, bias_gradient = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, inverse, True, eps, [False, True, True]
    )
    return (weight_gradient * weight + bias_gradient * bias).sum()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """``(a * b).sum()`` in float32 or better, without the product's memory where that can be avoided."""
    if torch.compiler.is_compiling() or a.dtype in (torch.float16, torch.bfloat16):
        return (a.to(torch.promote_types(a.dtype, torch.float32)) * b).sum()
    order = sorted(range(a.dim()), key=a.stride, reverse=True)  # a view of dense tensors of one memory format
    return torch.dot(a.permute(order).reshape(-1), b.permute(order).reshape(-1))


def learned_spikes(
    x: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int, lean: bool = True
) -> Tensor:
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
        lean: see `fixed_spikes`. Gradients are the same bits but for those of threshold and amplitude, whose sums run
            in another order.

    Returns:
        A tensor in the shape and dtype of ``x``. Twice differentiating is an error.
    """
    if not (lean and _keeps(time_steps)):
        return _LearnedSpikes.apply(x, threshold, amplitude, time_steps)
    output, codes, layout = _LeanLearnedSpikes.apply(x, threshold, amplitude, time_steps, norm_of(x))
    return attach(output, codes, 1.0 if amplitude is None else amplitude.detach(), layout)


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
    return exact_matmul(exact_matmul(value, viewed(key, _transposed)), query)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


class _LeanProduct(torch.autograd.Function):
    """Keeps the codes of operands that have some."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, of_left: Spikes | None, of_right: Spikes | None) -> Tensor:
        ctx.kept, saved = [], []
        for operand, spikes in ((left, of_left), (right, of_right)):
            kept, tensor, amplitude = Kept.of(operand, spikes)
            ctx.kept.append(kept)
            saved += [tensor, amplitude]
        ctx.save_for_backward(*saved)
        return left @ right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, of_left, right, of_right = ctx.saved_tensors
        gradients = (
            grad @ ctx.kept[1].operand(right, of_right).transpose(-1, -2) if ctx.needs_input_grad[0] else None,
            ctx.kept[0].operand(left, of_left).transpose(-1, -2) @ grad if ctx.needs_input_grad[1] else None,
        )
        return *gradients, None, None


def exact_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32 or better, so that integers up to 2**24 stay exact, whatever autocast wishes.

    Args:
        left: ``[..., I, C]``.
        right: ``[..., C, J]``.
    """
    of_left, of_right = spikes_of(left), spikes_of(right)
    lean = torch.is_grad_enabled() and (of_left or of_right) is not None and left.shape[:-2] == right.shape[:-2]
    with torch.autocast(left.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
        left, right = left.to(dtype), right.to(dtype)
        return _LeanProduct.apply(left, right, of_left, of_right) if lean else left @ right


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
