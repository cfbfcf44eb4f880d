"""Pure tensor functions: rounding, spike counts, weight quantization, the attention product.

Notation: ``T`` time steps, ``B`` images, ``C`` channels, ``H x W`` positions, ``N = H * W`` tokens. In training there
is no time axis: an activation is the number of spikes, ``0..T``, that the converted network fires over its window.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qsd.kernels import switch
from qsd.lsq import lsq_quantize as lsq_quantize
from qsd.rounding import HALF_TYPES, learned_slope, round_counts, slope, tie_slack


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where the mask holds, else 0. `torch.where` and `masked_fill` branch: eight times slower on a CPU."""
    return mask.to(x.dtype).mul_(x)


class CountRule(NamedTuple):
    """How a neuron rounds its drive to a count, and where its gradient passes.

    Attributes:
        half_even: Halves round to the even count (E-SpikeFormer's published base network) instead of up.
        closed: The gradient passes at the ends 0 and T of its window too.
        slack: Steps below a threshold that still reach it; ``None`` for that of `tie_slack` where the input and its
            threshold are known, and else for none.
    """

    half_even: bool = False
    closed: bool = False
    slack: float | None = None


HALF_UP = CountRule()


def passes(drive: Tensor, time_steps: int, closed: bool) -> Tensor:
    """Where the gradient of a count passes, as booleans: strictly between 0 and T, or at both ends too (closed)."""
    return (drive >= 0) & (drive <= time_steps) if closed else (drive > 0) & (drive < time_steps)


def spike_count(drive: Tensor, time_steps: int, rule: CountRule = HALF_UP) -> Tensor:
    """Number of spikes that a membrane fires within its window: ``clip(floor(drive + 1/2), 0, T)``.

    Halves round up, as an integrate-and-fire neuron that starts at half its threshold does, unless the rule says
    otherwise. The gradient is 1 where ``0 < drive < T``, strictly, else 0 (rectangular straight-through estimator of
    QSD-Transformer's published code); with a closed window it is 1 at 0 and T too.

    Args:
        drive: Accumulated input divided by the threshold, any shape.
        time_steps: T, the most spikes that a neuron can fire.
        rule: Rounding of halves, slack for ties, and the window of the gradient.

    Returns:
        Integer-valued counts in ``0..T``, in the dtype and shape of ``drive``. Twice differentiating is an error.
    """
    slack = rule.slack or 0.0
    if not (torch.is_grad_enabled() and drive.requires_grad):
        return round_counts(drive, time_steps, slack, rule.half_even)  # without the mask of the backward pass
    return _FixedSpikes.apply(drive, time_steps, 1.0, 1.0, rule)


def fixed_drive(x: Tensor, time_steps: int, threshold: float | None) -> Tensor:
    """Input in units of a fixed threshold.

    ``T * x`` and ``x / (1 / T)`` differ in the last bit where 1/T is no binary fraction, and ties are decided by that
    bit. An integer divided by the attention's threshold is correctly rounded.

    Args:
        x: Accumulated input, any shape.
        time_steps: T, the most spikes that a neuron can fire.
        threshold: Threshold in units of the input; ``None`` for ``1 / T``, as a product with T.
    """
    return x * time_steps if threshold is None else x / threshold


class _FixedSpikes(torch.autograd.Function):
    """Keeps one bit of information per element for the backward pass (a bool), never the membrane itself.

    Without a method `setup_context`, for speed, as in `qsd.lsq`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, time_steps: int, threshold: float | None, amplitude: float, rule: CountRule
    ) -> Tensor:
        drive = x if threshold == 1 else fixed_drive(x, time_steps, threshold)
        ctx.neuron = time_steps, threshold, amplitude
        ctx.save_for_backward(passes(drive, time_steps, rule.closed))
        counts = round_counts(drive, time_steps, rule.slack or 0.0, rule.half_even)
        return counts if amplitude == 1 else counts * amplitude

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (mask,) = ctx.saved_tensors
        return times_slope(_masked(grad, mask), *slope(*ctx.neuron)), None, None, None, None


def times_slope(grad: Tensor, time_steps: int, threshold: float | None, amplitude: float) -> Tensor:
    """A gradient that a neuron passes, in place times the neuron's slope, see `qsd.rounding.slope`.

    Args:
        grad: Any tensor.
        time_steps: T.
        threshold: Threshold, ``None`` for ``1 / T``.
        amplitude: Factor of the counts.
    """
    if amplitude != 1:
        grad.mul_(amplitude)
    if threshold is not None:
        return grad.div_(threshold)
    return grad if time_steps == 1 else grad.mul_(time_steps)


def fixed_spikes(
    x: Tensor, time_steps: int, threshold: float | None, amplitude: float, rule: CountRule = HALF_UP
) -> Tensor:
    """Spike counts of a neuron with a fixed threshold, times an amplitude; see `spike_count`.

    Args:
        x: Accumulated input, any shape.
        time_steps: T, the most spikes that a neuron can fire.
        threshold: Threshold in units of the input; ``None`` for ``1 / T``, as a product with T.
        amplitude: Factor of the counts.
        rule: Rounding of halves, and the window of the gradient.

    Returns:
        A tensor in the shape and dtype of ``x``. Twice differentiating is an error.
    """
    if switch.devices and time_steps <= 127 and switch.computes(x):
        from qsd.kernels import spikes

        return spikes.fixed_spikes(x, time_steps, threshold, amplitude, *rule)
    if rule.slack is None:
        rule = CountRule(rule.half_even, rule.closed, tie_slack(x, time_steps, threshold))
    if torch.is_grad_enabled() and x.requires_grad:
        return _FixedSpikes.apply(x, time_steps, threshold, amplitude, rule)
    counts = spike_count(fixed_drive(x, time_steps, threshold), time_steps, rule)
    return counts if amplitude == 1 else counts * amplitude


class _LearnedSpikes(torch.autograd.Function):
    """One fused pass each way; the drive is all that is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int) -> Tensor:
        drive = x / threshold
        counts = round_counts(drive, time_steps, tie_slack(x, time_steps, threshold))
        ctx.time_steps, ctx.is_step = time_steps, amplitude is threshold
        # Copies of the step sizes, which a later change of the parameters does not reach.
        other = None if amplitude is None or ctx.is_step else amplitude.clone()
        ctx.save_for_backward(drive, threshold.clone(), other)
        return counts if amplitude is None else counts * amplitude  # not in place, see `qsd.rounding.round_counts`

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        drive, threshold, other = ctx.saved_tensors
        amplitude = threshold if ctx.is_step else other
        return *learned_gradients(grad, drive, threshold, amplitude, ctx.time_steps, ctx.needs_input_grad), None


def learned_gradients(
    grad: Tensor, drive: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int, needed: tuple[bool, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of `learned_spikes` for input, threshold and amplitude.

    Args:
        grad: Gradient of the output.
        drive: Input over threshold.
        threshold: Threshold of the forward pass.
        amplitude: Amplitude of the forward pass, or ``None``. If it is the threshold itself, the slope is one.
        time_steps: T.
        needed: Whether the gradients of input, threshold and amplitude are needed.
    """
    # In one pass: the gradient strictly between 0 and T, zero elsewhere.
    passed = torch.ops.aten.hardtanh_backward(grad, drive, 0, time_steps)
    factor = learned_slope(threshold, amplitude)
    threshold_gradient = amplitude_gradient = None
    if needed[1]:
        threshold_gradient = -dot(passed, drive) if factor is None else -dot(passed, drive) * factor
    if needed[2]:
        amplitude_gradient = dot(grad, round_counts(drive, time_steps, tie_slack(drive, time_steps, threshold)))
    return passed if factor is None else passed.mul_(factor), threshold_gradient, amplitude_gradient


def dot(a: Tensor, b: Tensor) -> Tensor:
    """``(a * b).sum()`` in float32 or better, without the product's memory where that can be avoided.

    Args:
        a: Dense tensor.
        b: Dense tensor of the same shape.
    """
    if torch.compiler.is_compiling() or a.dtype in HALF_TYPES:
        return (a.to(torch.promote_types(a.dtype, torch.float32)) * b).sum()
    order = sorted(range(a.dim()), key=a.stride, reverse=True)  # a view of dense tensors of one memory format
    return torch.dot(a.permute(order).reshape(-1), b.permute(order).reshape(-1))


def learned_spikes(x: Tensor, threshold: Tensor, amplitude: Tensor | None, time_steps: int) -> Tensor:
    """Spike counts for a learned threshold, times a learned amplitude: ``a * clip(floor(x / theta + 1/2), 0, T)``.

    With the amplitude equal to the threshold this is LSQ for activations (Esser et al., 2020, with ``Q_n = 0`` and
    ``Q_p = T``), rounding halves up as an integrate-and-fire neuron does: the gradient of the step is
    ``floor(v + 1/2) - v`` where ``0 < v < T``, strictly, T above and 0 below, ``v = x / step``; that of the input is 1
    in the same range and 0 elsewhere. The factor of the step's gradient is `scale_gradient`'s. In general the rounding
    is passed straight through, and the derivatives follow.

    Args:
        x: Accumulated input, any shape.
        threshold: Positive, without dimensions.
        amplitude: Without dimensions; equal to the threshold for LSQ; ``None`` for bare counts.
        time_steps: T, the most spikes that a neuron can fire.

    Returns:
        A tensor in the shape and dtype of ``x``. Twice differentiating is an error.
    """
    if amplitude is threshold and torch.compiler.is_compiling():
        amplitude = threshold * 1  # Compiled by PyTorch 2.11 and 2.12, one of two equal arguments has no gradient.
    if switch.devices and time_steps <= 127 and switch.computes(x, threshold, amplitude):
        from qsd.kernels import spikes

        return spikes.learned_spikes(x, threshold, amplitude, time_steps)
    return _LearnedSpikes.apply(x, threshold, amplitude, time_steps)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` itself, to the bit, with its gradient multiplied by a factor.

    Args:
        x: Any tensor.
        factor: Factor of the gradient.
    """
    return _ScaleGradient.apply(x, factor)


def product_dtype(left: Tensor, right: Tensor) -> torch.dtype:
    """The type in which two tensors of counts are multiplied: float32 or better.

    Args:
        left: Any tensor.
        right: Any tensor.
    """
    return torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)


def exact_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32 or better, so that integers up to 2**24 stay exact, even under autocast.

    Args:
        left: ``[..., I, C]``.
        right: ``[..., C, J]``.
    """
    with torch.autocast(left.device.type, enabled=False):
        dtype = product_dtype(left, right)
        return left.to(dtype) @ right.to(dtype)


class _PadFrame(torch.autograd.Function):
    """`pad_frame` without a mask of the image, and with one pass over the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frame: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        value = frame.to(x.dtype).view(1, -1, 1, 1)
        padded = F.pad(x, [1, 1, 1, 1])
        padded[:, :, :: height + 1] = value
        padded[:, :, 1:-1, :: width + 1] = value
        return padded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return inside_frame(grad), None


def pad_frame(x: Tensor, frame: Tensor) -> Tensor:
    """Put one pixel around an image, of a value by channel: ``[B, C, H, W]`` to ``[B, C, H + 2, W + 2]``.

    Args:
        x: The image.
        frame: ``[C]``; it takes the dtype of ``x``, and gets no gradient.
    """
    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        return _PadFrame.apply(x, frame)
    # Transforms of `torch.func` do not know the Function. Compiled by PyTorch 2.11, a Function whose output was changed
    # in place gives no gradient.
    is_image = F.pad(x.new_ones(x.shape[-2:], dtype=torch.bool), [1, 1, 1, 1])
    return torch.where(is_image, F.pad(x, [1, 1, 1, 1]), frame.detach().to(x.dtype).view(1, -1, 1, 1))


def inside_frame(padded: Tensor) -> Tensor:
    """The inverse of `pad_frame`, which is its derivative, too: a dense copy of the image in the frame.

    Args:
        padded: ``[B, C, H + 2, W + 2]``.
    """
    return padded[:, :, 1:-1, 1:-1].clone()


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: in training, drop a whole residual branch per image with probability ``rate``.

    Args:
        x: A residual branch ``[B, ...]``.
        rate: Probability in ``[0, 1)``; branches that are not dropped are scaled by ``1 / (1 - rate)``.
        training: Whether branches are dropped at all.

    Returns:
        A tensor of the same shape.
    """
    if rate == 0.0 or not training:
        return x
    keep = torch.empty(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - rate)
    return x * keep.div_(1 - rate)
