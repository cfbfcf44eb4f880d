"""Blocks: down-sampling, convolutional block and transformer block of QSD-Transformer, and the MLP."""

from typing import Any

from torch import Tensor, nn

from qsd.functional import drop_path
from qsd.layers.attention import AttentionKind, SpikeDrivenSelfAttention
from qsd.layers.chains import LinearChain
from qsd.layers.layer_scale import LayerScale
from qsd.layers.quantized import QuantConv2d
from qsd.layers.renamed import rename_parameters
from qsd.neurons import Neurons, build_neuron


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    bias: bool = False,
    bits: int | None = 4,
    layer_scale: float | None = None,
) -> LinearChain:
    """A convolution that keeps the size (at stride 1) and a batch norm.

    Args:
        in_channels: Channels of the input ``[B, C_in, H, W]``.
        out_channels: Channels of the output ``[B, C_out, H', W']``.
        kernel_size: Odd side of the kernel; the padding is half of it.
        stride: Stride of the kernel.
        bias: Whether the convolution has a bias of its own.
        bits: Weight bits, 2 to 8, or ``None`` for float weights.
        layer_scale: Initial scale by channel of a residual branch that ends here, or ``None`` for none.
    """
    conv = QuantConv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias, weight_bits=bits)
    chain = LinearChain(conv=conv, norm=nn.BatchNorm2d(out_channels))
    if layer_scale is not None:
        chain.add_module("layer_scale", LayerScale(out_channels, layer_scale))
    return chain


class Downsample(nn.Module):
    """A neuron (unless it sees the image) and a strided convolution with batch norm.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel.
        stride: Stride of the kernel.
        first: Whether the input is an image and no residual stream, without a neuron in front.
        time_steps: T, or ``None`` for the float twin.
        weight_bits: 2 to 8, or ``None`` for float weights.
        neurons: Kind or constructor of the neuron, see `qsd.neurons.build_neuron`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 2,
        first: bool = False,
        time_steps: int | None = 4,
        weight_bits: int | None = 4,
        neurons: Neurons = "fixed",
    ) -> None:
        super().__init__()
        self.neuron = nn.Identity() if first else build_neuron(time_steps, kind=neurons)
        self.proj = conv_norm(in_channels, out_channels, kernel_size, stride, bias=True, bits=weight_bits)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` to ``[B, C_out, H', W']``."""
        return self.proj(self.neuron(x))


class SepConv(nn.Module):
    """Inverted separable convolution: pointwise to twice the channels, then depthwise 7x7 and pointwise back.

    There is no neuron between the depthwise and the second pointwise convolution, as in the published network.

    Args:
        dim: Channels of input and output.
        time_steps: T, or ``None`` for the float twin.
        weight_bits: 2 to 8, or ``None`` for float weights.
    """

    def __init__(self, dim: int, time_steps: int | None = 4, weight_bits: int | None = 4) -> None:
        super().__init__()
        hidden = 2 * dim
        self.neuron1 = build_neuron(time_steps)
        self.expand = conv_norm(dim, hidden, 1, bits=weight_bits)
        self.neuron2 = build_neuron(time_steps)
        self.reduce = LinearChain(
            depthwise=QuantConv2d(hidden, hidden, 7, padding=3, groups=hidden, weight_bits=weight_bits),
            pointwise=QuantConv2d(hidden, dim, 1, weight_bits=weight_bits),
            norm=nn.BatchNorm2d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        return self.reduce(self.neuron2(self.expand(self.neuron1(x))))


class Mlp(nn.Module):
    """Two convolutions, each with a neuron in front: 1x1 with bias in transformer blocks, 3x3 without in conv blocks.

    Args:
        dim: Channels of input and output.
        hidden: Channels between the convolutions.
        kernel_size: Side of both kernels.
        bias: Whether the convolutions have a bias.
        time_steps: T, or ``None`` for the float twin.
        weight_bits: 2 to 8, or ``None`` for float weights.
        neurons: Kind or constructor of the neurons, see `qsd.neurons.build_neuron`.
        layer_scale: Initial scale of the branch by channel, or ``None`` for none.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        kernel_size: int = 1,
        bias: bool = True,
        time_steps: int | None = 4,
        weight_bits: int | None = 4,
        neurons: Neurons = "fixed",
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.neuron1 = build_neuron(time_steps, kind=neurons)
        self.fc1 = conv_norm(dim, hidden, kernel_size, bias=bias, bits=weight_bits)
        self.neuron2 = build_neuron(time_steps, kind=neurons)
        self.fc2 = conv_norm(hidden, dim, kernel_size, bias=bias, bits=weight_bits, layer_scale=layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        return self.fc2(self.neuron2(self.fc1(self.neuron1(x))))


class ConvBlock(nn.Module):
    """Residual separable convolution and residual pair of dense 3x3 convolutions.

    Args:
        dim: Number of channels.
        mlp_ratio: Channels between the dense convolutions, over ``dim``.
        time_steps: T, or ``None`` for the float twin.
        weight_bits: 2 to 8, or ``None`` for float weights.
        branch_scale: Initial weight of the batch norm that ends each of the two branches (published: 1).
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        time_steps: int | None = 4,
        weight_bits: int | None = 4,
        branch_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.sep_conv = SepConv(dim, time_steps, weight_bits)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), 3, False, time_steps, weight_bits)
        # A residual stream that sums branches of variance 1 soon lies outside of the window of its neurons, 0 to 1,
        # where no gradient passes.
        for branch in (self.sep_conv.reduce, self.mlp.fc2):
            nn.init.constant_(branch.get_submodule("norm").weight, branch_scale)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        x = x + self.sep_conv(x)
        return x + self.mlp(x)


def _rename_parameters(_block: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    rename_parameters(state, prefix)


class TransformerBlock(nn.Module):
    """Residual attention and residual MLP, each scaled per channel.

    Args:
        dim: Number of channels.
        num_heads: Number of attention heads.
        mlp_ratio: Channels inside the MLP, over ``dim``.
        time_steps: T, or ``None`` for the float twin.
        weight_bits: 2 to 8, or ``None`` for float weights.
        attention: ``"linear"`` or ``"softmax"``, see `SpikeDrivenSelfAttention`.
        layer_scale: Initial scale of both branches (published: 1e-6).
        drop_path_rate: Probability of dropping a branch in training, per image.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        time_steps: int | None = 4,
        weight_bits: int | None = 4,
        attention: AttentionKind = "linear",
        layer_scale: float = 1e-6,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.attn = SpikeDrivenSelfAttention(dim, num_heads, time_steps, weight_bits, attention, layer_scale)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), 1, True, time_steps, weight_bits, layer_scale=layer_scale)
        self.drop_path_rate = drop_path_rate
        # Files of version 0.1.0 hold the layer scales as parameters of the block.
        self.register_load_state_dict_pre_hook(_rename_parameters)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        x = x + drop_path(self.attn(x), self.drop_path_rate, self.training)
        return x + drop_path(self.mlp(x), self.drop_path_rate, self.training)
