"""Chains of linear layers without a neuron between them, from the spikes of one neuron to the membrane of the next.

Every connection of the networks is such a chain, from a single convolution with batch norm to RepConv's six layers.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from qsd.functional import pad_frame
from qsd.layers.layer_scale import LayerScale
from qsd.layers.quantized import QuantConv2d, lean_form
from qsd.lean import (
    Choice,
    Synapse,
    framed_convolutions,
    group_of,
    has_hooks,
    is_ordinary,
    norm_in_training,
    trains_lean,
    two_norms,
    working_dtype,
)


class LinearChain(nn.Sequential):
    """Convolutions and batch norms in a row, with no neuron between: a linear map of spikes (in evaluation).

    In memory-lean training (`qsd.set_lean`), norms run together with the layers beside them, see `qsd.lean.norms`.

    Args:
        layers: The layers by name, in the order of application.
    """

    lean: Choice = "auto"

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` to ``[B, C_out, H', W']``."""
        if not (self.training and trains_lean(self.lean, x)):
            return super().forward(x)
        layers = list(self)
        while layers:
            first, taken = layers[0], 0
            if isinstance(first, nn.BatchNorm2d | nn.SyncBatchNorm):
                x, taken = _norms(x, layers)
            elif isinstance(first, BatchNormPad2d):
                x, taken = _framed(x, layers)
            if not taken:
                x, taken = first(x), 1
            del layers[:taken]
        return x


def _norms(x: Tensor, layers: list[nn.Module]) -> tuple[Tensor, int]:
    """Run the norms at the beginning of a row of layers, and a layer scale that follows them.

    Returns:
        The result, and the number of layers that ran; none if the first norm has to run by itself.
    """
    first = layers[0]
    if not is_ordinary(first) or x.dtype != first.weight.dtype:  # mixed types, in autocast, are left to torch
        return x, 0
    if len(layers) == 1:
        return norm_in_training(x, first), 1
    second = layers[1]
    if is_ordinary(second) and group_of(first) == group_of(second):
        scale = _scale(layers[2]) if len(layers) > 2 else None
        return two_norms(x, first, second, scale), 2 + (scale is not None)
    scale = _scale(second)
    return norm_in_training(x, first, scale), 1 + (scale is not None)


def _scale(layer: nn.Module) -> Tensor | None:
    """The factors of a layer scale that the norm in front of it can absorb, so that it takes no pass of its own."""
    return layer.gamma if isinstance(layer, LayerScale) and not has_hooks(layer) else None


def _framed(x: Tensor, layers: list[nn.Module]) -> tuple[Tensor, int]:
    """Run a norm with its frame and the two convolutions that follow it, as `_norms` does."""
    first = layers[0]
    assert isinstance(first, BatchNormPad2d)
    if len(layers) < 3 or not first.is_ordinary() or working_dtype(x) != x.dtype:
        return x, 0
    depthwise, pointwise = _bare_form(layers[1], x), _bare_form(layers[2], x)
    if depthwise is None or pointwise is None:
        return x, 0
    return framed_convolutions(x, first.norm, depthwise, pointwise), 3


def _bare_form(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, Synapse] | None:
    """Weight, step sizes and configuration of a convolution that may run together with its neighbours."""
    if not isinstance(layer, QuantConv2d) or layer.bias is not None or has_hooks(layer):
        return None
    form = lean_form(layer, x)
    return None if form is None else (layer.weight, *form)


class BatchNormPad2d(nn.Module):
    """Batch norm, then a frame of one pixel with the norm's output for an input of zeros.

    With it a padded 3x3 convolution behind a 1x1 convolution equals one 3x3 convolution on zero-padded input. In
    training the frame is taken from the running statistics after this batch's update, and no gradient flows through
    it, as in QSD-Transformer's published code. The norm is held, not inherited from: `convert_sync_batchnorm` replaces
    subclasses of batch norm and would lose the frame.

    Args:
        num_features: Channels of the input ``[B, C, H, W]``; the output is ``[B, C, H + 2, W + 2]``.
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
        channels: Input and output channels, ``[B, C, H, W]`` to ``[B, C, H, W]``.
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
