"""One convolution of a converted network, with norms folded in."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsd.functional import pad_frame
from qsd.spiking.layers.geometry import Geometry, Padding, Pair, padding_pairs, pair
from qsd.spiking.layers.movement import FLOAT_BITS


class Convolution(nn.Module):
    """One linear factor of a chain, with norms folded in.

    Args:
        weight: ``[C_out, C_in / groups, k_h, k_w]``.
        bias: ``[C_out]``.
        stride: Stride of the kernel, one number or two.
        padding: Rows and columns of zeros around the input, see `qsd.spiking.layers.geometry.Padding`.
        groups: Groups of channels.
        frame: Value by channel ``[C_out]`` of one pixel put around the output, or ``None`` for no frame.
        dilation: Distance of the kernel's taps, one number or two.
    """

    weight: Tensor
    bias: Tensor
    frame: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        groups: int = 1,
        frame: Tensor | None = None,
        dilation: int | Sequence[int] = 1,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("frame", frame)
        self.register_buffer("scale", None)
        self.stride, self.padding, self.groups = pair(stride), padding_pairs(padding), groups
        self.dilation = pair(dilation)

    @property
    def geometry(self) -> Geometry:
        """The shape of the convolution."""
        channels, inputs, *kernel = self.weight.shape
        frame = 0 if self.frame is None else 1
        return Geometry(channels, inputs, pair(kernel), self.stride, self.padding, self.groups, frame, self.dilation)

    @property
    def outer_padding(self) -> tuple[Pair, Pair]:
        """The padding of an equal convolution without a frame, which is the response to zeros around the input."""
        frame = 0 if self.frame is None else 1
        height, width = ((before + frame, after + frame) for before, after in self.padding)
        return height, width

    def stored_bits(self, width: int) -> float:
        """Bits of the weights, of one scale and one bias by output channel, and of the frame.

        Args:
            width: Bits of a weight.
        """
        return self.weight.numel() * width + FLOAT_BITS * self.vectors * len(self.bias)

    @property
    def vectors(self) -> int:
        """Numbers that are stored for each output channel: scale, bias, and value of the frame."""
        return 2 if self.frame is None else 3

    def quantize(self, bits: int, dtype: torch.dtype) -> None:
        """Round the weights to integers times a scale by output channel (symmetric).

        Args:
            bits: Bits of the integers.
            dtype: Type in which the scale has to be exact, so that the weights can be rebuilt in that type.
        """
        largest = self.weight.abs().amax(dim=(1, 2, 3))
        scale = torch.where(largest > 0, largest / (2 ** (bits - 1) - 1), 1.0).to(dtype).to(self.weight.dtype)
        self.restore((self.weight / scale.view(-1, 1, 1, 1)).round(), scale, self.bias)

    def integers(self) -> Tensor:
        """The integers of quantized weights, int16 ``[C_out, C_in / groups, k_h, k_w]``."""
        assert self.scale is not None
        return (self.weight / self.scale.view(-1, 1, 1, 1)).round().to(torch.int16)

    def restore(self, integers: Tensor, scale: Tensor, bias: Tensor) -> None:
        """Put in quantized weights.

        Args:
            integers: ``[C_out, C_in / groups, k_h, k_w]``.
            scale: Value of one unit of the integers, ``[C_out]``.
            bias: ``[C_out]``.
        """
        self.scale = scale.to(self.weight)
        self.weight = integers.to(self.weight) * self.scale.view(-1, 1, 1, 1)
        self.bias = bias.to(self.weight)

    def forward(self, x: Tensor, share: float = 1.0) -> Tensor:
        """Convolve ``[B, C_in, H, W]``, with a share of bias and frame.

        Args:
            x: Input.
            share: 1 in the count domain, less in a step: over a window both are added once.
        """
        (top, bottom), (left, right) = self.padding
        padding = top, left
        if (top, left) != (bottom, right):  # as padding="same" of an even kernel is
            x, padding = F.pad(x, [left, right, top, bottom]), (0, 0)
        y = F.conv2d(x, self.weight, self.bias * share, self.stride, padding, self.dilation, self.groups)
        return y if self.frame is None else pad_frame(y, self.frame * share)
