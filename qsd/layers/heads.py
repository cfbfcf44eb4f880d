"""Classifiers."""

import torch
from torch import Tensor
from torch.nn import functional as F

from qsd.layers.integer_sums import integer_sums, is_exact
from qsd.layers.quantized import QuantLinear
from qsd.operands import mean_of_counts


class TokenMeanLinear(QuantLinear):
    """Low-bit classifier of the mean over all tokens. At conversion the 1/N of the mean goes into its weights.

    Args:
        in_features: Channels C of the tokens.
        out_features: Number of classes.
        weight_bits: 2 to 8, or ``None`` for float weights.
        drop_rate: Dropout on the mean, in training.
    """

    def __init__(
        self, in_features: int, out_features: int, weight_bits: int | None = 4, drop_rate: float = 0.0
    ) -> None:
        super().__init__(in_features, out_features, weight_bits=weight_bits)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[B, C, H, W]``, or their mean ``[B, C]`` with its dropout done, to logits ``[B, classes]``."""
        if x.dim() == 4:
            if self.integer_operands and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
                means = mean_of_counts(x)
                if means is not None and is_exact(self, means):
                    return integer_sums(self, means)
            x = F.dropout(x.mean(dim=(2, 3)), self.drop_rate, self.training)
        return super().forward(x)
