"""Max-pooling and averaging of spikes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qsd.spike_codes import Kept, Layout, Spikes, attach, encode, spikes_of


class _LeanMaxPool(torch.autograd.Function):
    """Keeps the codes of what comes in, and pools again in the backward pass: indices take eight bytes each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spikes: Spikes, pool: tuple[Any, ...]) -> tuple[Tensor, Tensor, Layout]:
        ctx.kept, saved, amplitude = Kept.of(x, spikes)
        ctx.pool = pool
        pooled, _ = torch.ops.aten.max_pool2d_with_indices(x, *pool)
        counts = (pooled / spikes.amplitude).round_()
        codes, layout = encode(counts, torch.zeros_like(counts), spikes.layout.bits)
        ctx.save_for_backward(saved, amplitude)
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        return pooled, codes, layout

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        x = ctx.kept.operand(*ctx.saved_tensors)
        indices = torch.ops.aten.max_pool2d_with_indices(x, *ctx.pool)[1]
        return torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *ctx.pool, indices), None, None


class SpikeMaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` that, behind a neuron, keeps spike counts of few bits for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H', W']``."""
        spikes = spikes_of(x)
        if spikes is None or self.return_indices or not torch.is_grad_enabled():
            return super().forward(x)
        pool = [_pair(v) for v in (self.kernel_size, self.stride, self.padding, self.dilation)]
        pooled, codes, layout = _LeanMaxPool.apply(x, spikes, (*pool, self.ceil_mode))
        return attach(pooled, codes, spikes.amplitude, layout)


def _pair(value: int | tuple[int, ...]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


class TokenMean(nn.Module):
    """Mean over the tokens, ``[B, C, H, W]`` to ``[B, C]``; its 1/N goes into the weights behind it at conversion."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C]``."""
        return x.mean(dim=(2, 3))
