"""Max-pooling and averaging of spikes."""

from torch import Tensor, nn

from qsd.lean import spike_max_pool


class SpikeMaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` that, behind a neuron, keeps spike counts of few bits for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H', W']``."""
        if not self.return_indices:
            kernel, stride, padding, dilation = (
                _pair(v) for v in (self.kernel_size, self.stride, self.padding, self.dilation)
            )
            pooled = spike_max_pool(x, (kernel, stride, padding, dilation, self.ceil_mode))
            if pooled is not None:
                return pooled
        return super().forward(x)


def _pair(value: int | tuple[int, ...]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


class TokenMean(nn.Module):
    """Mean over the tokens, ``[B, C, H, W]`` to ``[B, C]``; conversion folds its 1/N into the weights that follow."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C]``."""
        return x.mean(dim=(2, 3))
