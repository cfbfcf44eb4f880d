"""Max-pooling of spikes that keeps codes, not indices."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsd.lean.codes import encode_counts
from qsd.lean.operands import layout_of, note_codes, save_operand

# Kernel, stride, padding and dilation, two numbers each, and whether sizes are rounded up.
Pool = tuple[list[int], list[int], list[int], list[int], bool]


class _SpikeMaxPool(torch.autograd.Function):
    """Keeps the codes of the input, and pools again in the backward pass: indices take eight bytes each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Pool) -> Tensor:
        ctx.operand, saved = save_operand(x)
        ctx.pool = pool
        ctx.save_for_backward(saved)
        pooled: Tensor = torch.ops.aten.max_pool2d_with_indices(x, *pool)[0]
        layout = ctx.operand.layout
        if layout is not None:
            note_codes(pooled, *encode_counts(pooled, layout))  # the largest of some counts is a count
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x = ctx.operand.restore(*ctx.saved_tensors)
        indices = torch.ops.aten.max_pool2d_with_indices(x, *ctx.pool)[1]
        return torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *ctx.pool, indices), None


def spike_max_pool(x: Tensor, pool: Pool) -> Tensor | None:
    """Max-pooling of a neuron's output.

    Args:
        x: ``[B, C, H, W]``.
        pool: Arguments of the pool.

    Returns:
        ``[B, C, H', W']``, or ``None`` if nothing is gained: no gradient is recorded, or ``x`` has no codes.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or layout_of(x) is None:
        return None
    return _SpikeMaxPool.apply(x, pool)
