"""Batch norms of chains in training, with less work and memory than the layers one by one, and the same results."""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qsd.functional import inside_frame, pad_frame
from qsd.kernels import switch
from qsd.lean.layers import Synapse
from qsd.lean.memory import dense, images_of_block, is_dense
from qsd.lean.operands import GRADIENTS, NORMS, NormOrigin
from qsd.lean.statistics import Norm, Running, Values, group_of, norm_gradients, normalised
from qsd.lean.switch import hooks_of


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
        ctx.set_materialize_grads(False)  # zeros for the two that have none
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
        ctx.in_kernels = _in_kernels(x, first)
        if ctx.in_kernels and isinstance(values, int):
            from qsd.kernels import norms

            weight, inverse, spread = norms.merge(g1, g2, var, first.eps, second.eps, values)
        else:
            between = g1.square() * (var / (var + first.eps))
            inverse = (between + second.eps).rsqrt()
            weight, spread = g1 * g2 * inverse, between * (values / (values - 1))
        if second.mean is not None and second.var is not None:
            second.mean.lerp_(b1, second.share)
            second.var.lerp_(spread, second.share)
        ctx.eps, ctx.values, ctx.group = (first.eps, second.eps), values, first.group
        ctx.save_for_backward(x, g1, g2, mean, var, weight, inverse)
        return normalised(x, weight, b2, mean, var, first.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, g1, g2, mean, var, weight, inverse = ctx.saved_tensors
        (e1, e2), values = ctx.eps, ctx.values
        # The gradients of an ordinary norm whose weight w is a constant.
        x_grad, weight_grad, b2_grad, total = norm_gradients(grad, x, weight, mean, var, values, e1, ctx.group)
        # Then w's own dependence on the variance, small where e1 is small against v:
        # dw/dv = -1/2 g1 g2 i^3 g1^2 dr/dv = -1/2 w i^2 g1^2 e1 / (v + e1)^2, and dv/dx = 2 (x - m) / values.
        # dw/dg1 = g2 i - g1^2 g2 r i^3 = g2 i^3 (1/i^2 - g1^2 r) = g2 i^3 e2. The bias b1 cancels out.
        if ctx.in_kernels:
            from qsd.kernels import norms

            slope, shift, g1_grad, g2_grad = norms.merge_backward(
                weight_grad, weight, g1, g2, mean, var, inverse, e1, e2, values
            )
            x_grad = norms.add_by_channel(dense(x_grad, x.stride()), x, slope, shift)
        else:
            slope = total * weight * inverse.square() * g1.square() * (-e1 / values) / (var + e1).square()
            _add_by_channel_(x_grad, x, slope, slope * mean)
            g1_grad, g2_grad = weight_grad * g2 * inverse**3 * e2, weight_grad * g1 * inverse
        return x_grad, g1_grad, torch.zeros_like(g1), g2_grad, b2_grad, None, None


def _in_kernels(x: Tensor, running: Running) -> bool:
    """Whether kernels compute what two norms in a row have beyond an ordinary norm."""
    if not switch.devices or running.group is not None or x.dtype != torch.float32:
        return False
    return is_dense(x) and switch.computes(x)


def _add_by_channel_(grad: Tensor, x: Tensor, slope: Tensor, shift: Tensor) -> None:
    """Add ``slope * x - shift`` to a gradient ``[B, C, H, W]``, a few images at a time, which stay in the cache."""
    slope, shift = slope.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
    images = images_of_block(x)
    for part, values in zip(grad.split(images), x.split(images)):
        part.addcmul_(values, slope).sub_(shift)


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
        assert running.mean is not None
        assert running.var is not None
        mean, var, ctx.values = running.batch(x)
        y = normalised(x, gamma, beta, mean, var, running.eps)
        # After this batch's update of the statistics.
        frame = beta - running.mean * (gamma / torch.sqrt(running.var + running.eps))
        hidden = first.forward(pad_frame(y, frame), weight1, step1)
        ctx.eps, ctx.group, ctx.first, ctx.second = running.eps, running.group, first, second
        ctx.save_for_backward(x, gamma, beta, mean, var, frame, weight1, step1, weight2, step2)
        return second.forward(hidden, weight2, step2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, mean, var, frame, weight1, step1, weight2, step2 = ctx.saved_tensors
        first, second, mask = ctx.first, ctx.second, [True, True, False]
        grid1, grid2 = first.grid(weight1, step1, x.dtype), second.grid(weight2, step2, x.dtype)
        framed = pad_frame(normalised(x, gamma, beta, mean, var, ctx.eps), frame)
        hidden = first.forward(framed, grid1.values, None)
        hidden_grad, weight2_grad, _, step2_grad = second.backward(grad, hidden, weight2, step2, grid2, mask)
        framed_grad, weight1_grad, _, step1_grad = first.backward(hidden_grad, framed, weight1, step1, grid1, mask)
        y_grad = inside_frame(framed_grad)
        gradients = norm_gradients(y_grad, x, gamma, mean, var, ctx.values, ctx.eps, ctx.group)[:3]
        return *gradients, weight1_grad, step1_grad, weight2_grad, step2_grad, None, None, None


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
