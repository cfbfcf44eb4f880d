"""Learned scale of a residual branch."""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Factor by channel at the end of a residual branch (Touvron et al., CaiT, 2021).

    It stands last in the branch's `LinearChain`, so that conversion folds it into the chain's weights. A threshold
    cannot absorb it: the neurons that read the residual stream see the sum of several branches.

    Args:
        dim: Number of channels C.
        init_values: Initial value of all factors.
    """

    def __init__(self, dim: int, init_values: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        return x * self.gamma.view(1, -1, 1, 1)
