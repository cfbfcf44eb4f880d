"""Chains of linear layers without a neuron between them: what lies between the spikes of one neuron and the next.

Every connection of the networks is such a chain, from a single convolution with batch norm to RepConv's six layers.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from qsd.functional import pad_frame
from qsd.layers.quantized import QuantConv2d


class LinearChain(nn.Sequential):
    """Convolutions and batch norms in a row, with no neuron between: a linear map of spikes (in evaluation).

    Args:
        layers: the layers by name, in the order of application.
    """

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__(OrderedDict(layers))


class BatchNormPad2d(nn.Module):
    """Batch norm, then a frame of one pixel that holds what the norm makes of zeros.

    With it a padded 3x3 convolution behind a 1x1 convolution equals one 3x3 convolution on zero-padded input. In
    training the frame is taken from the running statistics after this batch's update, and no gradient flows through
    it, as in QSD-Transformer's published code. The norm is held, not inherited from: `convert_sync_batchnorm` replaces
    subclasses of batch norm and would lose the frame.

    Args:
        num_features: channels of the input ``[B, C, H, W]``; the output is ``[B, C, H + 2, W + 2]``.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features)

    def frame(self) -> Tensor:
        """The value of the frame by channel, ``[C]``, without gradient."""
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        return norm.bias.detach() - norm.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H + 2, W + 2]``."""
        y = self.norm(x)  # first: it updates the statistics that the frame is made of
        return pad_frame(y, self.frame())


def rep_conv(channels: int, weight_bits: int | None = 4) -> LinearChain:
    """RepConv of the attention projections: 1x1, norm and frame, depthwise 3x3, 1x1, norm, norm.

    It equals one dense 3x3 convolution with padding 1 in evaluation. The two norms in a row are the published
    network's: one closes the reparametrisable chain, one belongs to the projection.

    Args:
        channels: input and output channels, ``[B, C, H, W]`` to ``[B, C, H, W]``.
        weight_bits: 2 to 8, or ``None`` for float weights.
    """
    return LinearChain(
        pointwise1=QuantConv2d(channels, channels, 1, weight_bits=weight_bits),
        norm_pad=BatchNormPad2d(channels),
        depthwise=QuantConv2d(channels, channels, 3, groups=channels, weight_bits=weight_bits),
        pointwise2=QuantConv2d(channels, channels, 1, weight_bits=weight_bits),
        norm1=nn.BatchNorm2d(channels),
        norm2=nn.BatchNorm2d(channels),
    )
