"""Batch norms of chains in training, with less work and memory than the layers one by one, and the same results."""

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qsd.functional import pad_frame
from qsd.lean.layers import Synapse
from qsd.lean.operands import NORMS, NormOrigin
from qsd.lean.switch import has_hooks
from qsd.lsq import lsq_quantize


def is_ordinary(norm: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    """Whether a module is a plain `BatchNorm2d` in training mode without hooks.

    Synchronised norms are none: their statistics are those of all processes.

    Args:
        norm: Any module.
    """
    return type(norm) is nn.BatchNorm2d and norm.training and norm.affine and not has_hooks(norm)


class Running(NamedTuple):
    """The running statistics of a norm, and the weight of a new batch in them.

    Attributes:
        mean: Running mean ``[C]``, or ``None`` if there is none.
        var: Running variance ``[C]``, unbiased, or ``None`` if there is none.
        share: Weight of this batch, the norm's momentum.
        eps: Epsilon of the norm.
    """

    mean: Tensor | None
    var: Tensor | None
    share: float
    eps: float

    @staticmethod
    def of(norm: nn.BatchNorm2d, x: Tensor) -> "Running":
        """The statistics of a norm that is about to see a batch; the batch is counted.

        Args:
            norm: A norm in training mode.
            x: The batch ``[B, C, H, W]``.

        Raises:
            ValueError: For a single value per channel, which has no variance, as PyTorch does.
        """
        if x.numel() // x.shape[1] < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        share = 0.0 if norm.momentum is None else norm.momentum
        if norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                share = 1 / float(norm.num_batches_tracked)
        return Running(norm.running_mean, norm.running_var, share, norm.eps)


def norm_in_training(x: Tensor, norm: nn.BatchNorm2d, scale: Tensor | None = None) -> Tensor:
    """A batch norm that notes the origin of its output for a neuron of learned step that follows it.

    Args:
        x: ``[B, C, H, W]``.
        norm: A norm that `is_ordinary`.
        scale: Factor of the output by channel, ``[C]``, or ``None``.
    """
    weight, bias = (norm.weight, norm.bias) if scale is None else (norm.weight * scale, norm.bias * scale)
    running_mean, running_var, share, eps = Running.of(norm, x)
    output, mean, inverse = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, share, eps)
    NORMS[output.untyped_storage()] = NormOrigin(x, weight, bias, mean, inverse, eps)
    return output


class _TwoNorms(torch.autograd.Function):
    r"""Two batch norms in a row as one.

    Let m and v be mean and variance of the batch, g1 and b1, g2 and b2 the weights and biases, e1 and e2 the epsilons.
    The output of the first norm has the mean b1 and the variance ``g1^2 r`` with ``r = v / (v + e1)``. So both norms
    together are

        y = w (x - m) / sqrt(v + e1) + b2   with   w = g1 g2 i,   i = 1 / sqrt(g1^2 r + e2):

    one norm of weight w and bias b2, whose weight depends on the batch through v.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, g1: Tensor, b1: Tensor, g2: Tensor, b2: Tensor, first: Running, second: Running
    ) -> Tensor:
        values = x.numel() // x.shape[1]
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
        # The gradients of an ordinary norm whose weight w is a constant.
        x_grad, weight_grad, b2_grad = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, (var + e1).rsqrt(), True, e1, all_three
        )
        # Then w's own dependence on the variance, small where e1 is small against v:
        # dw/dv = -1/2 g1 g2 i^3 g1^2 dr/dv = -1/2 w i^2 g1^2 e1 / (v + e1)^2, and dv/dx = 2 (x - m) / values.
        var_grad = weight_grad * weight * inverse.square() * g1.square() * (-0.5 * e1) / (var + e1).square()
        slope = (var_grad * (2 * x.shape[1] / x.numel())).view(1, -1, 1, 1)
        x_grad.addcmul_(x, slope).sub_(slope * mean.view(1, -1, 1, 1))
        # dw/dg1 = g2 i - g1^2 g2 r i^3 = g2 i^3 (1/i^2 - g1^2 r) = g2 i^3 e2. The bias b1 cancels out.
        g1_grad = weight_grad * g2 * inverse**3 * e2
        return x_grad, g1_grad, torch.zeros_like(g1), weight_grad * g1 * inverse, b2_grad, None, None


def two_norms(x: Tensor, first: nn.BatchNorm2d, second: nn.BatchNorm2d, scale: Tensor | None = None) -> Tensor:
    """Two batch norms in a row in one pass, exactly, with the parameters and running statistics of both.

    Args:
        x: ``[B, C, H, W]``.
        first: A norm that `is_ordinary`.
        second: Another one.
        scale: Factor of the output by channel, ``[C]``, or ``None``.
    """
    weight, bias = (second.weight, second.bias) if scale is None else (second.weight * scale, second.bias * scale)
    return _TwoNorms.apply(x, first.weight, first.bias, weight, bias, Running.of(first, x), Running.of(second, x))


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
        first: Synapse,
        second: Synapse,
    ) -> Tensor:
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
    first: tuple[Tensor, Tensor | None, Synapse],
    second: tuple[Tensor, Tensor | None, Synapse],
) -> Tensor:
    """The middle of a RepConv: norm and frame, a depthwise and a pointwise convolution without biases.

    The depthwise convolution is cheap and computed again in the backward pass.

    Args:
        x: ``[B, C, H, W]``.
        norm: A norm that `is_ordinary`, with running statistics.
        first: Weights, step sizes or ``None``, and configuration of the depthwise convolution.
        second: The same of the pointwise convolution.
    """
    return _FramedConvs.apply(
        x, norm.weight, norm.bias, *first[:2], *second[:2], Running.of(norm, x), first[2], second[2]
    )
