"""Products of spike counts that keep codes of their operands."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsd import functional
from qsd.functional import product_dtype
from qsd.lean.operands import cast, layout_of, save_operand


class _SpikeProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.left, saved_left = save_operand(left)
        ctx.right, saved_right = save_operand(right)
        ctx.save_for_backward(saved_left, saved_right)
        return left @ right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        return (
            grad @ ctx.right.restore(right).transpose(-1, -2) if ctx.needs_input_grad[0] else None,
            ctx.left.restore(left).transpose(-1, -2) @ grad if ctx.needs_input_grad[1] else None,
        )


def exact_matmul(left: Tensor, right: Tensor) -> Tensor:
    """`qsd.functional.exact_matmul` that keeps codes of operands that come from neurons.

    Args:
        left: ``[..., I, C]``.
        right: ``[..., C, J]``.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or left.shape[:-2] != right.shape[:-2]:
        return functional.exact_matmul(left, right)
    if layout_of(left) is None and layout_of(right) is None:
        return functional.exact_matmul(left, right)
    dtype = product_dtype(left, right)
    with torch.autocast(left.device.type, enabled=False):
        return _SpikeProduct.apply(cast(left, dtype), cast(right, dtype))
