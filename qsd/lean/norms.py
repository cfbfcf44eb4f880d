"""Batch norms of chains in training, with less work and memory than the layers one by one, and the same results."""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qsd.functional import pad_frame
from qsd.lean.layers import Synapse
from qsd.lean.operands import GRADIENTS, NORMS, NormOrigin
from qsd.lean.statistics import Norm, Running, Values, group_of, norm_gradients, normalised
from qsd.lean.switch import hooks_of
from qsd.lsq import lsq_quantize


def is_ordinary(norm: nn.Module | None) -> TypeGuard[Norm]:
    """Whether a module is a plain `BatchNorm2d` or `SyncBatchNorm` in training mode without hooks.

    A synchronised norm in a single process is left to PyTorch.

    Args:
        norm: Any module.
    """
    if type(norm) is nn.SyncBatchNorm and group_of(norm) is None:
        return False
    if norm is None or type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return False
    return bool(norm.training and norm.affine and not any(hooks_of(norm)))


class _Norm(torch.autograd.Function):
    """A norm whose gradients the neuron behind it may have computed already, see `NormGradients`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running: Running, call: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var, share, eps, _ = running
        ctx.eps, ctx.call = eps, call
        output, mean, inverse = torch.native_batch_norm(x, weight, bias, mean, var, True, share, eps)
        ctx.mark_non_differentiable(mean, inverse)
        ctx.save_for_backward(x, weight, mean, inverse)
        return output, mean, inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        known = GRADIENTS.pop(grad.untyped_storage(), None)
        if known is not None and (known.call, known.version) == (ctx.call, grad._version):
            return *known.gradients, None, None
        mask = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, ctx.eps, mask
        )
        return *(g if needed else None for g, needed in zip(gradients, mask)), None, None


class _SharedNorm(torch.autograd.Function):
    """A norm by the statistics of several processes, computed before."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        values: Values,
        eps: float,
        group: Any,
    ) -> Tensor:
        ctx.values, ctx.eps, ctx.group = values, eps, group
        ctx.save_for_backward(x, weight, mean, var)
        return normalised(x, weight, bias, mean, var, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        gradients = norm_gradients(grad, x, weight, mean, var, ctx.values, ctx.eps, ctx.group)
        return *gradients[:3], *[None] * 5


def norm_in_training(x: Tensor, norm: Norm, scale: Tensor | None = None) -> Tensor:
    """A batch norm that notes the origin of its output for a neuron of learned step that follows it.

    Args:
        x: ``[B, C, H, W]``.
        norm: A norm that `is_ordinary`.
        scale: Factor of the output by channel, ``[C]``, or ``None``.
    """
    weight, bias = (norm.weight, norm.bias) if scale is None else (norm.weight * scale, norm.bias * scale)
    running = Running.of(norm, x)
    eps, group, call = running.eps, running.group, object()
    var = None
    if group is None:
        output, mean, inverse = _Norm.apply(x, weight, bias, running, call)
    else:
        mean, var, values = running.batch(x)
        inverse = (var + eps).rsqrt()
        output = _SharedNorm.apply(x, weight, bias, mean, var, values, eps, group)
    versions = x._version, weight._version, bias._version, output._version
    NORMS[output.untyped_storage()] = NormOrigin(x, weight, bias, mean, inverse, eps, var, versions, call)
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
        mean, var, values = first.batch(x)
        between = g1.square() * (var / (var + first.eps))
        inverse = (between + second.eps).rsqrt()
        if second.mean is not None and second.var is not None:
            second.mean.lerp_(b1, second.share)
            second.var.lerp_(between * (values / (values - 1)), second.share)
        ctx.eps, ctx.values, ctx.group = (first.eps, second.eps), values, first.group
        ctx.save_for_backward(x, g1, g2, mean, var, inverse)
        return normalised(x, g1 * g2 * inverse, b2, mean, var, first.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, g1, g2, mean, var, inverse = ctx.saved_tensors
        e1, e2 = ctx.eps
        weight = g1 * g2 * inverse
        # The gradients of an ordinary norm whose weight w is a constant.
        x_grad, weight_grad, b2_grad, total = norm_gradients(grad, x, weight, mean, var, ctx.values, e1, ctx.group)
        # Then w's own dependence on the variance, small where e1 is small against v:
        # dw/dv = -1/2 g1 g2 i^3 g1^2 dr/dv = -1/2 w i^2 g1^2 e1 / (v + e1)^2, and dv/dx = 2 (x - m) / values.
        var_grad = total * weight * inverse.square() * g1.square() * (-0.5 * e1) / (var + e1).square()
        slope = (var_grad * (2 / ctx.values)).view(1, -1, 1, 1)
        x_grad.addcmul_(x, slope).sub_(slope * mean.view(1, -1, 1, 1))
        # dw/dg1 = g2 i - g1^2 g2 r i^3 = g2 i^3 (1/i^2 - g1^2 r) = g2 i^3 e2. The bias b1 cancels out.
        g1_grad = weight_grad * g2 * inverse**3 * e2
        return x_grad, g1_grad, torch.zeros_like(g1), weight_grad * g1 * inverse, b2_grad, None, None


def two_norms(x: Tensor, first: Norm, second: Norm, scale: Tensor | None = None) -> Tensor:
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
        ctx.eps, ctx.group, ctx.values = running.eps, running.group, 0
        assert running.mean is not None
        assert running.var is not None
        shared: tuple[Tensor, ...] = ()
        if running.group is None:
            y = F.batch_norm(x, running.mean, running.var, gamma, beta, True, running.share, running.eps)
        else:
            mean, var, ctx.values = running.batch(x)
            shared = mean, var
            y = normalised(x, gamma, beta, mean, var, running.eps)
        # After this batch's update of the statistics.
        frame = beta - running.mean * (gamma / torch.sqrt(running.var + running.eps))
        hidden = first.forward(pad_frame(y, frame), weight1, step1)
        ctx.first, ctx.second = first, second
        ctx.save_for_backward(x, gamma, beta, weight1, step1, weight2, step2, frame, *shared)
        return second.forward(hidden, weight2, step2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight1, step1, weight2, step2, frame, *shared = ctx.saved_tensors
        inputs = [t.detach().requires_grad_() for t in (x, gamma, beta, weight1)]
        steps = [] if step1 is None else [step1.detach().requires_grad_()]
        with torch.enable_grad():
            if shared:
                y = _SharedNorm.apply(*inputs[:3], *shared, ctx.values, ctx.eps, ctx.group)
            else:
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
    norm: Norm,
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
