"""Max-pooling and averaging of spikes."""

import torch
from torch import Tensor, nn

from qsd.lean import spike_max_pool
from qsd.operands import counts_of, note_amplitude, with_counts


class SpikeMaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` that, behind a neuron, keeps spike counts of few bits for the backward pass."""

    integer_operands: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H', W']``."""
        if self.return_indices:
            return super().forward(x)
        counts = counts_of(x) if self.integer_operands else None
        if counts is not None and not torch.is_grad_enabled():
            # The largest of some counts times a positive amplitude is the largest count times the amplitude.
            with torch.inference_mode(False), torch.no_grad():
                return with_counts(super().forward(counts.values).to(x.dtype), counts.amplitude, counts.largest)
        kernel, stride, padding, dilation = (
            _pair(v) for v in (self.kernel_size, self.stride, self.padding, self.dilation)
        )
        pooled = spike_max_pool(x, (kernel, stride, padding, dilation, self.ceil_mode))
        pooled = super().forward(x) if pooled is None else pooled
        return pooled if counts is None else note_amplitude(pooled, counts.amplitude, counts.largest)


def _pair(value: int | tuple[int, ...]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


class TokenMean(nn.Module):
    """Mean over the tokens, ``[B, C, H, W]`` to ``[B, C]``; conversion folds its 1/N into the weights that follow."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C]``."""
        return x.mean(dim=(2, 3))
