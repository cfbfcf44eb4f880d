"""Max-pooling of spikes that keeps codes, not indices."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsd.lean.codes import encode_counts
from qsd.lean.operands import CODES, Codes, layout_of, save_operand

# Kernel, stride, padding and dilation, two numbers each, and whether sizes are rounded up.
Pool = tuple[list[int], list[int], list[int], list[int], bool]


class _SpikeMaxPool(torch.autograd.Function):
    """Keeps the codes of the input, and pools again in the backward pass: indices take eight bytes each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Pool) -> Tensor:
        ctx.operand, saved = save_operand(x)
        ctx.pool = pool
        ctx.save_for_backward(saved)
        pooled = _largest(x, pool)
        layout = ctx.operand.layout
        codes = None if layout is None else encode_counts(pooled, layout)  # the largest of some counts is a count
        if codes is not None:
            CODES[pooled.untyped_storage()] = Codes(*codes, pooled._version)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x = ctx.operand.restore(*ctx.saved_tensors)
        indices = _indices(x, ctx.pool)
        return torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *ctx.pool, indices), None


def _largest(x: Tensor, pool: Pool) -> Tensor:
    """The result of a pool without its indices."""
    if not (type(x) is Tensor and x.is_cpu and x.is_contiguous()):
        return torch.ops.aten.max_pool2d_with_indices(x, *pool)[0]
    # PyTorch's kernel for this layout goes value by value. Rows and columns one after the other take half the time.
    *sides, _ = pool
    sizes = torch.ops.aten.max_pool2d_with_indices(x.to("meta"), *pool)[0].shape
    for axis, kernel, stride, padding, dilation in zip((2, 3), *sides):
        length, shape = x.shape[axis], list(x.shape)
        shape[axis] = size = sizes[axis]
        largest = x.new_full(shape, -torch.inf)
        for offset in range(-padding, kernel * dilation - padding, dilation):
            # The outputs for which this tap of the kernel lies on the input.
            first, end = max(0, -(offset // stride)), min(size, (length - 1 - offset) // stride + 1)
            if first < end:
                taken = x[(slice(None),) * axis + (slice(first * stride + offset, None, stride),)]
                part = largest.narrow(axis, first, end - first)
                torch.maximum(part, taken.narrow(axis, 0, end - first), out=part)
        x = largest
    return x


def _indices(x: Tensor, pool: Pool) -> Tensor:
    """The positions of a pool's results; of equal ones, the first in the order of rows."""
    if not (x.is_cpu and x.is_contiguous()):
        return torch.ops.aten.max_pool2d_with_indices(x, *pool)[1]
    # With its channels last, copies included, PyTorch's kernel takes half the time.
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.aten.max_pool2d_with_indices(x, *pool)[1].contiguous()


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
