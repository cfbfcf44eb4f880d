"""Batch norms of chains in training, with less work and memory than the layers one by one, and the same results."""

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qsd.functional import lsq_quantize, pad_frame
from qsd.layers.lean import LeanLinear, has_hooks
from qsd.spike_codes import remember_norm


def is_ordinary(norm: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    """Whether a module is a batch norm by this batch's statistics, of which nobody wants to see in- or output.

    Synchronised norms are none: their statistics are those of all processes.

    Args:
        norm: any module.
    """
    return type(norm) is nn.BatchNorm2d and norm.training and norm.affine and not has_hooks(norm)


@dataclass(frozen=True)
class Running:
    """The running statistics of a norm, and how much a batch counts in them.

    Attributes:
        mean: ``[C]``, or ``None`` if there are none.
        var: ``[C]``, unbiased.
        share: of this batch.
        eps: of the norm.
    """

    mean: Tensor | None
    var: Tensor | None
    share: float
    eps: float

    @staticmethod
    def of(norm: nn.BatchNorm2d) -> "Running":
        """The statistics of a norm that is about to see a batch, which it counts.

        Args:
            norm: in training.
        """
        share = 0.0 if norm.momentum is None else norm.momentum
        if norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                share = 1 / float(norm.num_batches_tracked)
        return Running(norm.running_mean, norm.running_var, share, norm.eps)


def _check_values(x: Tensor) -> int:
    values = x.numel() // x.shape[1]
    if values < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    return values


def norm_in_training(x: Tensor, norm: nn.BatchNorm2d, scale: Tensor | None = None) -> Tensor:
    """A batch norm whose output knows where it comes from, for a neuron behind it (see `qsd.spike_codes.NormOrigin`).

    Args:
        x: ``[B, C, H, W]``.
        norm: `is_ordinary`.
        scale: factor by channel of the output, ``[C]``.
    """
    _check_values(x)
    weight, bias = _affine(norm, scale)
    running = Running.of(norm)
    output, mean, inverse = torch.native_batch_norm(
        x, weight, bias, running.mean, running.var, True, running.share, running.eps
    )
    return remember_norm(output, x, weight, bias, mean, inverse, running.eps)


def _affine(norm: nn.BatchNorm2d, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return (norm.weight, norm.bias) if scale is None else (norm.weight * scale, norm.bias * scale)


class _TwoNorms(torch.autograd.Function):
    r"""With batch mean m and variance v, the first norm's output has mean b1 and variance ``g1^2 r, r = v / (v + e1)``.

    So both are one norm of weight ``g1 g2 / sqrt(g1^2 r + e2)`` and bias ``b2``. The weight depends on the batch.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, g1: Tensor, b1: Tensor, g2: Tensor, b2: Tensor, first: Running, second: Running
    ) -> Tensor:
        values = _check_values(x)
        mean, var = torch.batch_norm_update_stats(x, first.mean, first.var, first.share)
        between = g1.square() * (var / (var + first.eps))
        inverse = (between + second.eps).rsqrt()
        if second.mean is not None and second.var is not None:
            second.mean.lerp_(b1, second.share)
            second.var.lerp_(between * (values / (values - 1)), second.share)
        ctx.eps = first.eps, second.eps
        ctx.save_for_backward(x, g1, g2, mean, var, inverse)
        return torch.native_batch_norm(x, g1 * g2 * inverse, b2, mean, var, False, 0.0, first.eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, g1, g2, mean, var, inverse = ctx.saved_tensors
        e1, e2 = ctx.eps
        weight, all_three = g1 * g2 * inverse, [True, True, True]
        x_grad, weight_grad, b2_grad = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, (var + e1).rsqrt(), True, e1, all_three
        )
        # What flows through the weight's own dependence on the batch's variance: small, but not nothing.
        var_grad = weight_grad * weight * inverse.square() * g1.square() * (-0.5 * e1) / (var + e1).square()
        slope = (var_grad * (2 * x.shape[1] / x.numel())).view(1, -1, 1, 1)
        x_grad.addcmul_(x, slope).sub_(slope * mean.view(1, -1, 1, 1))
        g1_grad = weight_grad * g2 * inverse**3 * e2
        return x_grad, g1_grad, torch.zeros_like(g1), weight_grad * g1 * inverse, b2_grad, None, None


def two_norms(x: Tensor, first: nn.BatchNorm2d, second: nn.BatchNorm2d, scale: Tensor | None = None) -> Tensor:
    """Two batch norms in a row in one pass, exactly, with the parameters and running statistics of both.

    Args:
        x: ``[B, C, H, W]``.
        first: `is_ordinary`.
        second: `is_ordinary`.
        scale: factor by channel of the output, ``[C]``.
    """
    weight, bias = _affine(second, scale)
    return _TwoNorms.apply(x, first.weight, first.bias, weight, bias, Running.of(first), Running.of(second))


class _FramedConvs(torch.autograd.Function):
    """Norm, frame, and two convolutions, the first of them cheap; only the norm's input is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weight1: Tensor,
        step1: Tensor | None,
        weight2: Tensor,
        step2: Tensor | None,
        running: Running,
        first: LeanLinear,
        second: LeanLinear,
    ) -> Tensor:
        _check_values(x)
        y = F.batch_norm(x, running.mean, running.var, gamma, beta, True, running.share, running.eps)
        assert running.mean is not None
        assert running.var is not None
        # After this batch's update of the statistics.
        frame = beta - running.mean * (gamma / torch.sqrt(running.var + running.eps))
        hidden = first.forward(pad_frame(y, frame), weight1, step1)
        ctx.eps, ctx.first, ctx.second = running.eps, first, second
        ctx.save_for_backward(x, gamma, beta, weight1, step1, weight2, step2, frame)
        return second.forward(hidden, weight2, step2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight1, step1, weight2, step2, frame = ctx.saved_tensors
        inputs = [t.detach().requires_grad_() for t in (x, gamma, beta, weight1)]
        steps = [] if step1 is None else [step1.detach().requires_grad_()]
        with torch.enable_grad():
            y = F.batch_norm(inputs[0], None, None, inputs[1], inputs[2], True, 0.0, ctx.eps)
            rounded = lsq_quantize(inputs[3], steps[0], *ctx.first.levels) if steps else inputs[3]
            hidden = ctx.first.forward(pad_frame(y, frame), rounded, None)
        hidden_grad, weight2_grad, _, step2_grad = ctx.second.backward(
            grad, hidden.detach(), weight2, step2, [True, True, False]
        )
        gradients = torch.autograd.grad(hidden, [*inputs, *steps], hidden_grad)
        return *gradients, *([] if steps else [None]), weight2_grad, step2_grad, None, None, None


def framed_convolutions(
    x: Tensor,
    norm: nn.BatchNorm2d,
    first: tuple[Tensor, Tensor | None, LeanLinear],
    second: tuple[Tensor, Tensor | None, LeanLinear],
) -> Tensor:
    """The inside of a RepConv: norm and frame, a depthwise and a pointwise convolution without biases.

    What lies between is cheap and computed again in the backward pass.

    Args:
        x: ``[B, C, H, W]``.
        norm: `is_ordinary`, with running statistics.
        first: weights, step sizes or ``None``, and the rest of the depthwise convolution.
        second: the same of the pointwise one.
    """
    return _FramedConvs.apply(x, norm.weight, norm.bias, *first[:2], *second[:2], Running.of(norm), first[2], second[2])
