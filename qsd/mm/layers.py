"""Layers of necks and heads: a neuron, then a low-bit convolution or linear layer."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.layers import LinearChain, QuantConv2d, QuantLinear, initialize_steps
from qsd.neurons import build_neuron

# Initialisation of layers that predict classes. OpenMMLab's own, a standard deviation of 0.01, would also fix the step
# size, and with it the largest weight (about 4.5 standard deviations at 4 bits): the logits of few channels stay small.
CLASSIFIER = {"type": "Kaiming", "mode": "fan_in", "nonlinearity": "linear"}


@dataclass(frozen=True)
class SpikeSettings:
    """Settings of all layers of a neck or head, ``spike_cfg`` in a configuration.

    Attributes:
        time_steps: T; 0 or ``None`` for ReLUs instead of neurons.
        weight_bits: 2 to 8, or 0 or ``None`` for float weights.
        threshold: Step size of the neuron, the input that one spike stands for; ``None`` for ``1 / T``.
        amplitude: Output of one spike; ``None`` for the threshold.
    """

    time_steps: int | None = 4
    weight_bits: int | None = 4
    threshold: float | None = None
    amplitude: float | None = None

    def neuron(self) -> nn.Module:
        """A neuron of these settings."""
        return build_neuron(self.time_steps or None, self.threshold, self.amplitude)


def spike_conv_cfg(spike_cfg: dict[str, Any] | None, norm_cfg: dict[str, Any] | None) -> dict[str, Any]:
    """The ``conv_cfg`` that makes mmcv's ``ConvModule`` a neuron, a convolution and perhaps a batch norm.

    Args:
        spike_cfg: Fields of `SpikeSettings`.
        norm_cfg: ``dict(type="BN")`` for a batch norm, or ``None``. Only batch norms can be folded into weights;
            ``sync_bn = "torch"`` in a configuration synchronises them.

    Raises:
        QsdError: For another norm.
    """
    if norm_cfg is not None and norm_cfg.get("type") != "BN":
        raise QsdError(f"norm_cfg={dict(norm_cfg)}: spiking layers have batch norms, dict(type='BN'), or None.")
    return {"type": "SpikeConv2d", "spike_cfg": spike_cfg, "batch_norm": norm_cfg is not None}


@MODELS.register_module()
class SpikeConv2d(nn.Sequential):
    """A neuron, a low-bit convolution and perhaps a batch norm; registered as ``conv_cfg=dict(type="SpikeConv2d")``.

    Args:
        in_channels: Channels of the currents ``[B, C_in, H, W]`` that come in.
        out_channels: Channels of the currents that go out.
        kernel_size: Side of the kernel.
        stride: Stride of the kernel.
        padding: Rows and columns of zeros around the spikes.
        dilation: 1; mmcv passes this argument.
        groups: Number of groups of channels.
        bias: Whether the convolution has a bias; a batch norm replaces it.
        batch_norm: Whether a batch norm follows the convolution.
        spike_cfg: Fields of `SpikeSettings`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        batch_norm: bool = False,
        spike_cfg: dict[str, Any] | None = None,
    ) -> None:
        if dilation != 1:
            raise QsdError(f"dilation={dilation}: spiking convolutions have no dilation; use 1.")
        settings = SpikeSettings(**(spike_cfg or {}))
        conv = QuantConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            groups,
            bias and not batch_norm,
            settings.weight_bits or None,
        )
        layers = {"conv": conv, "norm": nn.BatchNorm2d(out_channels)} if batch_norm else {"conv": conv}
        super().__init__(OrderedDict(neuron=settings.neuron(), proj=LinearChain(**layers)))
        # Attributes that mmcv's ConvModule reads.
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, groups
        self.transposed, self.output_padding = False, conv.output_padding


@MODELS.register_module()
class SpikeLinear(nn.Sequential):
    """A neuron and a low-bit linear layer.

    Args:
        in_features: Features of the currents ``[..., C_in]`` that come in.
        out_features: Features of the currents that go out.
        spike_cfg: Fields of `SpikeSettings`.
    """

    def __init__(self, in_features: int, out_features: int, spike_cfg: dict[str, Any] | None = None) -> None:
        settings = SpikeSettings(**(spike_cfg or {}))
        linear = QuantLinear(in_features, out_features, weight_bits=settings.weight_bits or None)
        super().__init__(OrderedDict(neuron=settings.neuron(), linear=linear))


class _PixelShuffle(nn.PixelShuffle):
    """PyTorch's pixel shuffle, whose backward pass fails on an empty batch: of regions where no image has a box."""

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[0] > 0:
            return super().forward(input)
        _, channels, height, width = input.shape
        side = self.upscale_factor
        return input.reshape(0, channels // side**2, height * side, width * side)


class SpikeDeconv2d(nn.Sequential):
    """A neuron and a transposed convolution of kernel and stride 2, in its equivalent form of four 1x1 convolutions.

    Each input pixel makes 2x2 output pixels that no other input pixel touches.

    Args:
        in_channels: Channels of the currents ``[B, C_in, H, W]`` that come in.
        out_channels: Channels of the currents ``[B, C_out, 2 H, 2 W]`` that go out.
        spike_cfg: Fields of `SpikeSettings`.
    """

    def __init__(self, in_channels: int, out_channels: int, spike_cfg: dict[str, Any] | None = None) -> None:
        conv = SpikeConv2d(in_channels, 4 * out_channels, 1, spike_cfg=spike_cfg)
        super().__init__(OrderedDict(conv=conv, shuffle=_PixelShuffle(2)))


class InitializeSteps(BaseModule):
    """Base of necks and heads: step sizes are initialised from the weights that OpenMMLab's initialisation sets."""

    def init_weights(self) -> None:
        """Initialise weights, then the step sizes from them."""
        super().init_weights()
        initialize_steps(self)
