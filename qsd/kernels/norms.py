"""Operators of two batch norms in a row, each one launch of a program of `qsd.kernels.norm_programs`."""

import torch
from torch import Tensor

from qsd.kernels.norm_programs import add_by_channel as add_by_channel_program
from qsd.kernels.norm_programs import merge as merge_program
from qsd.kernels.norm_programs import merge_backward as merge_backward_program
from qsd.kernels.operators import BLOCK, grid, operator, wrap_triton

# Channels of a program.
CHANNELS = 128


@operator("qsd::merge")
def merge(g1: Tensor, g2: Tensor, var: Tensor, e1: float, e2: float, values: int) -> tuple[Tensor, Tensor, Tensor]:
    """The second of two norms and its running variance, from the first one, see `qsd.lean.norms`.

    Args:
        g1: Weight of the first norm ``[C]``.
        g2: Weight of the second norm.
        var: Variance of the batch in front of the first norm, biased.
        e1: Epsilon of the first norm.
        e2: Epsilon of the second norm.
        values: Values per channel of the batch.

    Returns:
        The weight of both norms as one, the inverse deviation of the second norm's input, and its unbiased variance.
    """
    weight, inverse, spread = (torch.empty_like(var) for _ in range(3))
    wrap_triton(merge_program)[grid(len(var), CHANNELS)](
        g1, g2, var, weight, inverse, spread, len(var), e1, e2, values / (values - 1), BLOCK=CHANNELS
    )
    return weight, inverse, spread


@operator("qsd::merge_backward")
def merge_backward(
    weight_grad: Tensor,
    weight: Tensor,
    g1: Tensor,
    g2: Tensor,
    mean: Tensor,
    var: Tensor,
    inverse: Tensor,
    e1: float,
    e2: float,
    values: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `merge`.

    Args:
        weight_grad: Gradient of the weight of both norms as one ``[C]``.
        weight: That weight.
        g1: As of `merge`.
        g2: As of `merge`.
        mean: Mean of the batch in front of the first norm.
        var: Its variance, biased.
        inverse: Result of `merge`.
        e1: As of `merge`.
        e2: As of `merge`.
        values: As of `merge`.

    Returns:
        The factor of the input and the constant that `add_by_channel` needs, and the gradients of both weights.
    """
    slope, shift, g1_grad, g2_grad = (torch.empty_like(var) for _ in range(4))
    wrap_triton(merge_backward_program)[grid(len(var), CHANNELS)](
        weight_grad, weight, g1, g2, mean, var, inverse, slope, shift, g1_grad, g2_grad, len(var), e1, e2, values,
        BLOCK=CHANNELS,
    )  # fmt: skip
    return slope, shift, g1_grad, g2_grad


@operator("qsd::add_by_channel")
def add_by_channel(grad: Tensor, x: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """``grad + slope * x - shift``, with factors and constants of the channels, in one pass.

    Args:
        grad: ``[B, C, H, W]``, contiguous or channels-last.
        x: The same, with the same strides.
        slope: ``[C]``.
        shift: ``[C]``.
    """
    out = torch.empty_like(grad)
    wrap_triton(add_by_channel_program)[grid(x.numel())](
        grad, x, slope, shift, out, x.numel(), x.stride(1), x.shape[1], BLOCK=BLOCK
    )
    return out
