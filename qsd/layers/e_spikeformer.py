"""Layers of E-SpikeFormer (Spike-driven Transformer V3): Yao, Qiu et al., IEEE TPAMI 47(4), 2025.

The order of layers follows the published classification code
(https://github.com/BICLab/Spike-Driven-Transformer-V3). In the base network a neuron stands in front of every
convolution, so that no chain has to be merged. The large network has chains of two pointwise convolutions.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.functional import drop_path
from qsd.layers.attention import CountAttention, MatrixProduct, SpikeProduct, check_heads
from qsd.layers.blocks import Mlp, conv_norm
from qsd.layers.chains import LinearChain
from qsd.layers.layer_scale import LayerScale
from qsd.layers.quantized import QuantConv2d
from qsd.neurons import Rounding, SpikeNeuron, Window, build_neuron

# Time steps of the published networks. A float twin, which has none, takes its scale of attention from them.
_PUBLISHED_STEPS = 4


@dataclass(frozen=True)
class UnitNeurons:
    """The family's neurons: a threshold of one, and spikes that add up to a count over T, unless told otherwise.

    It is a constructor as `qsd.neurons.build_neuron` takes it.

    Attributes:
        rounding: Rounding of halves, see `qsd.neurons.SpikeNeuron`.
        window: Window of the gradient, see `qsd.neurons.SpikeNeuron`.
    """

    rounding: Rounding = "half_up"
    window: Window | None = None

    def __call__(self, time_steps: int, threshold: float | None, amplitude: float | None) -> SpikeNeuron:
        threshold = 1.0 if threshold is None else threshold
        amplitude = 1 / time_steps if amplitude is None else amplitude
        return SpikeNeuron(time_steps, threshold, amplitude, self.rounding, self.window)


class SpikeSepConv(nn.Module):
    """Inverted separable convolution with a neuron in front of each of its three convolutions, and a norm behind.

    Args:
        dim: Channels of input and output; there are twice as many between.
        kernel_size: Side of the depthwise kernel.
        time_steps: T, or ``None`` for the float twin.
        weight_bits: 2 to 8, or ``None`` for float weights.
        neurons: Constructor of the neurons.
    """

    def __init__(
        self, dim: int, kernel_size: int, time_steps: int | None, weight_bits: int | None, neurons: UnitNeurons
    ) -> None:
        super().__init__()
        hidden = 2 * dim
        self.neuron1, self.neuron2, self.neuron3 = (build_neuron(time_steps, kind=neurons) for _ in range(3))
        self.expand = conv_norm(dim, hidden, 1, bits=weight_bits)
        depthwise = QuantConv2d(
            hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden, weight_bits=weight_bits
        )
        self.depthwise = LinearChain(conv=depthwise, norm=nn.BatchNorm2d(hidden))
        self.reduce = conv_norm(hidden, dim, 1, bits=weight_bits)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        return self.reduce(self.neuron3(self.depthwise(self.neuron2(self.expand(self.neuron1(x))))))


class SpikeConvBlock(nn.Module):
    """Residual separable convolution (7x7) and residual pair of dense 3x3 convolutions.

    Args:
        dim: Number of channels.
        mlp_ratio: Channels between the dense convolutions, over ``dim``.
        separable: Whether there is a separable convolution; the large network has none, and biases in the pair.
        kinds: Arguments ``time_steps``, ``weight_bits`` and ``neurons``.
    """

    def __init__(self, dim: int, mlp_ratio: float, separable: bool, kinds: dict[str, Any]) -> None:
        super().__init__()
        self.sep_conv = SpikeSepConv(dim, 7, **kinds) if separable else None
        self.mlp = Mlp(dim, int(dim * mlp_ratio), 3, bias=not separable, **kinds)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        if self.sep_conv is not None:
            x = x + self.sep_conv(x)
        return x + self.mlp(x)


class EfficientSelfAttention(CountAttention):
    """Self-attention of E-SpikeFormer (E-SDSA), see `CountAttention`.

    The published code multiplies query, key and value in units of 1/T and then the product by a scale. Here they are
    counts, and the attention neuron fires one spike for every ``T^3 / scale`` of their integer product.

    Args:
        dim: Channels of input, queries and keys.
        num_heads: Number of heads; must divide ``dim``.
        value_ratio: Channels of the values, over ``dim``.
        scale: Scale of the product; ``None`` for ``2 / sqrt(dim / num_heads)``.
        pairs: Whether projections are pairs of pointwise convolutions (`pointwise_pair`), as in the large network.
        layer_scale: Initial scale of the branch by channel, or ``None`` for none.
        kinds: Arguments ``time_steps``, ``weight_bits`` and ``neurons``.

    Raises:
        QsdError: If the heads do not divide the channels, or the values have no channel.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        value_ratio: int,
        scale: float | None,
        pairs: bool,
        layer_scale: float | None,
        kinds: dict[str, Any],
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if value_ratio < 1:
            raise QsdError(f"value_ratio={value_ratio} leaves no channels for the values of attention.")
        self.num_heads = num_heads
        time_steps, bits, neurons = (kinds[key] for key in ("time_steps", "weight_bits", "neurons"))
        values = value_ratio * dim
        if pairs:
            self.q_proj, self.k_proj = (pointwise_pair(dim, dim, bits) for _ in range(2))
            self.v_proj = pointwise_pair(dim, values, bits)
        else:
            self.q_proj, self.k_proj = (conv_norm(dim, dim, 1, bits=bits) for _ in range(2))
            self.v_proj = conv_norm(dim, values, 1, bits=bits)
        self.neuron = build_neuron(time_steps, kind=neurons)
        self.q_neuron, self.k_neuron, self.v_neuron = (build_neuron(time_steps, None, 1.0, neurons) for _ in range(3))
        self.key_value, self.query = SpikeProduct(), MatrixProduct()
        scale = 2 / math.sqrt(dim // num_heads) if scale is None else scale
        if time_steps is None:
            self.product_scale = scale / _PUBLISHED_STEPS**3
        self.attn_neuron = build_neuron(time_steps, (time_steps or 1) ** 3 / scale, None, neurons)
        if pairs:
            self.proj = pointwise_pair(values, dim, bits, layer_scale)
        else:
            self.proj = conv_norm(values, dim, 1, bits=bits, layer_scale=layer_scale)


def pointwise_pair(
    in_channels: int, out_channels: int, weight_bits: int | None, layer_scale: float | None = None
) -> LinearChain:
    """Two pointwise convolutions without a neuron between: 1x1, norm, 1x1, norm, norm.

    It equals one pointwise convolution in evaluation, which is cheaper: the inner channels are 1.5 times as many. The
    two norms in a row are the published network's: one belongs to the pair, one to the projection.

    Args:
        in_channels: Channels of the input ``[B, C_in, H, W]``.
        out_channels: Channels of the output.
        weight_bits: 2 to 8, or ``None`` for float weights.
        layer_scale: Initial scale by channel of a residual branch that ends here, or ``None`` for none.
    """
    hidden = int(in_channels * 1.5)
    chain = LinearChain(
        pointwise1=QuantConv2d(in_channels, hidden, 1, weight_bits=weight_bits),
        norm1=nn.BatchNorm2d(hidden),
        pointwise2=QuantConv2d(hidden, out_channels, 1, weight_bits=weight_bits),
        norm2=nn.BatchNorm2d(out_channels),
        norm3=nn.BatchNorm2d(out_channels),
    )
    if layer_scale is not None:
        chain.add_module("layer_scale", LayerScale(out_channels, layer_scale))
    return chain


class ESpikeBlock(nn.Module):
    """Residual separable convolution (3x3; base network), residual attention and residual MLP.

    Args:
        dim: Number of channels.
        num_heads: Number of attention heads.
        mlp_ratio: Channels inside the MLP, over ``dim``.
        value_ratio: Channels of the values of attention, over ``dim``.
        large: Whether it is a block of the large network: without separable convolution, with pairs of pointwise
            convolutions, the attention scale 1/8 and layer scales.
        layer_scale: Initial scale of both branches of a block of the large network.
        drop_path_rate: Probability of dropping a branch in training, per image.
        kinds: Arguments ``time_steps``, ``weight_bits`` and ``neurons``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        value_ratio: int,
        large: bool,
        layer_scale: float | None,
        drop_path_rate: float,
        kinds: dict[str, Any],
    ) -> None:
        super().__init__()
        self.sep_conv = None if large else SpikeSepConv(dim, 3, **kinds)
        scale = 0.125 if large else None
        self.attn = EfficientSelfAttention(dim, num_heads, value_ratio, scale, large, layer_scale, kinds)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), 1, True, layer_scale=layer_scale, **kinds)
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        for branch in (self.sep_conv, self.attn, self.mlp):
            if branch is not None:
                x = x + drop_path(branch(x), self.drop_path_rate, self.training)
        return x
