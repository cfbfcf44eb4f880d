"""Chains of linear layers without a neuron between them: what lies between the spikes of one neuron and the next.

Every connection of the networks is such a chain, from a single convolution with batch norm to RepConv's six layers.
"""

from collections import OrderedDict
from typing import TypeGuard

import torch
from torch import Tensor, nn

from qsd.functional import pad_frame
from qsd.layers.layer_scale import LayerScale
from qsd.layers.quantized import QuantConv2d, is_lean, lean_form
from qsd.lean import (
    framed_convolutions,
    has_hooks,
    is_ordinary,
    norm_in_training,
    two_norms,
    working_dtype,
)


class LinearChain(nn.Sequential):
    """Convolutions and batch norms in a row, with no neuron between: a linear map of spikes (in evaluation).

    In training, norms run together with what lies beside them (see `qsd.lean.norms`), unless `qsd.set_lean` switches
    that off.

    Args:
        layers: the layers by name, in the order of application.
    """

    lean = True

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` to ``[B, C_out, H', W']``."""
        if not (self.lean and self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return super().forward(x)
        layers = list(self)
        while layers:
            x, taken = _advance(layers, x)
            del layers[:taken]
        return x


def _advance(layers: list[nn.Module], x: Tensor) -> tuple[Tensor, int]:
    """Run the first layers of a row: the result, and how many they were."""
    first, (second, third) = layers[0], (*layers[1:3], None, None)[:2]
    if isinstance(first, BatchNormPad2d) and first.is_ordinary() and working_dtype(x) == x.dtype:
        if _is_bare(second) and _is_bare(third):
            convs = [(conv.weight, *lean_form(conv)) for conv in (second, third)]
            return framed_convolutions(x, first.norm, *convs), 3
    elif is_ordinary(first) and x.dtype == first.weight.dtype:  # mixed types, in autocast, are left to torch
        if is_ordinary(second):
            scale = _scale(third)
            return two_norms(x, first, second, scale), 2 + (scale is not None)
        scale = _scale(second)
        return norm_in_training(x, first, scale), 1 + (scale is not None)
    return first(x), 1


def _scale(layer: nn.Module | None) -> Tensor | None:
    """The factors of a layer scale that the norm in front of it can take in; it costs no pass of its own then."""
    return layer.gamma if isinstance(layer, LayerScale) and not has_hooks(layer) else None


def _is_bare(layer: nn.Module | None) -> TypeGuard[QuantConv2d]:
    return isinstance(layer, QuantConv2d) and layer.bias is None and is_lean(layer) and not has_hooks(layer)


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

    def is_ordinary(self) -> bool:
        """Whether the norm may run together with what follows it."""
        return is_ordinary(self.norm) and self.norm.track_running_stats and not has_hooks(self)

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


def rep_conv(channels: int, weight_bits: int | None = 4, layer_scale: float | None = None) -> LinearChain:
    """RepConv of the attention projections: 1x1, norm and frame, depthwise 3x3, 1x1, norm, norm.

    It equals one dense 3x3 convolution with padding 1 in evaluation. The two norms in a row are the published
    network's: one closes the reparametrisable chain, one belongs to the projection.

    Args:
        channels: input and output channels, ``[B, C, H, W]`` to ``[B, C, H, W]``.
        weight_bits: 2 to 8, or ``None`` for float weights.
        layer_scale: Initial scale by channel of a residual branch that ends here, or ``None`` for none.
    """
    chain = LinearChain(
        pointwise1=QuantConv2d(channels, channels, 1, weight_bits=weight_bits),
        norm_pad=BatchNormPad2d(channels),
        depthwise=QuantConv2d(channels, channels, 3, groups=channels, weight_bits=weight_bits),
        pointwise2=QuantConv2d(channels, channels, 1, weight_bits=weight_bits),
        norm1=nn.BatchNorm2d(channels),
        norm2=nn.BatchNorm2d(channels),
    )
    if layer_scale is not None:
        chain.add_module("layer_scale", LayerScale(channels, layer_scale))
    return chain
