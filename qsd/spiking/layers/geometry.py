"""Shapes of convolutions, from which their operations are counted."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# One number for height and width, or one for each.
Pair = tuple[int, int]
# The same, or numbers before and after the input, for height and for width.
Padding = int | Pair | tuple[Pair, Pair]


def pair(value: int | Sequence[int]) -> Pair:
    """A number for height and one for width.

    Args:
        value: One number for both, or two.
    """
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width


def padding_pairs(padding: Padding) -> tuple[Pair, Pair]:
    """Rows above and below the input, and columns to its left and right.

    Args:
        padding: See `Padding`.
    """
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    height, width = padding
    return pair(height), pair(width)


@dataclass(frozen=True)
class Side:
    """A convolution along one dimension of the image.

    Attributes:
        kernel: Length of the kernel.
        stride: Stride of the kernel.
        padding: Positions before and after the input.
        dilation: Distance of the kernel's taps.
    """

    kernel: int
    stride: int
    padding: Pair
    dilation: int

    def size(self, length: int) -> int:
        """Length of the output, without a frame.

        Args:
            length: Length of the input.
        """
        return (length + sum(self.padding) - self.dilation * (self.kernel - 1) - 1) // self.stride + 1


@dataclass(frozen=True)
class Geometry:
    """Shape of a convolution.

    Attributes:
        channels: Channels of the output.
        inputs: Channels that one output sees.
        kernel: Side of the kernel, or its height and width.
        stride: Stride of the kernel.
        padding: Padding around the input.
        groups: Groups of channels.
        frame: Pixels put around the output.
        dilation: Distance of the kernel's taps.
    """

    channels: int
    inputs: int
    kernel: int | Pair
    stride: int | Pair
    padding: Padding
    groups: int = 1
    frame: int = 0
    dilation: int | Pair = 1

    @property
    def sides(self) -> tuple[Side, Side]:
        """The convolution along the height and along the width."""
        height, width = zip(pair(self.kernel), pair(self.stride), padding_pairs(self.padding), pair(self.dilation))
        return Side(*height), Side(*width)

    @property
    def taps(self) -> int:
        """Number of pixels under the kernel."""
        return math.prod(pair(self.kernel))

    @classmethod
    def merged(cls, factors: "Sequence[Geometry]") -> "Geometry":
        """The shape of the one convolution that equals a chain.

        Args:
            factors: Shapes of the chain's convolutions, in order.
        """
        if len(factors) == 1:
            return factors[0]
        core = max(factors, key=lambda factor: factor.taps)
        frame = max(factor.frame for factor in factors)
        top, left = ((before + frame, after + frame) for before, after in padding_pairs(core.padding))
        vertical, horizontal = zip(*(pair(factor.stride) for factor in factors))
        inputs = factors[0].inputs * factors[0].groups
        stride = math.prod(vertical), math.prod(horizontal)
        return cls(factors[-1].channels, inputs, core.kernel, stride, (top, left), dilation=core.dilation)

    def size(self, height: int, width: int) -> Pair:
        """Height and width of the output, without a frame.

        Args:
            height: Height of the input.
            width: Width of the input.
        """
        vertical, horizontal = self.sides
        return vertical.size(height), horizontal.size(width)


@functools.lru_cache(maxsize=1024)
def _reach(side: Side, length: int) -> tuple[int, ...]:
    """By input position, the number of output positions that see it."""
    reached = [0] * length
    for output in range(side.size(length)):
        first = output * side.stride - side.padding[0]
        for position in range(first, first + side.kernel * side.dilation, side.dilation):
            if 0 <= position < length:
                reached[position] += 1
    return tuple(reached)


def fan_out(size: tuple[int, int], geometry: Geometry) -> Tensor:
    """Synapses of an input pixel, borders included: the number of outputs that one spike is added to, ``[H, W]``.

    Args:
        size: Height and width of the input.
        geometry: Shape of the convolution; weights that are zero count as synapses.
    """
    reached = torch.outer(*(torch.tensor(_reach(side, length)) for side, length in zip(geometry.sides, size)))
    return geometry.channels // geometry.groups * reached


def dense_macs(factors: Sequence[Geometry], height: int, width: int) -> list[float]:
    """Multiply-accumulates of each factor for one image as papers count them, positions in the padding included.

    Args:
        factors: Shapes of convolutions in a row.
        height: Height of the first one's input.
        width: Width of the first one's input.
    """
    macs = []
    for factor in factors:
        height, width = factor.size(height, width)
        macs.append(float(factor.channels * factor.inputs * factor.taps * height * width))
        height, width = height + 2 * factor.frame, width + 2 * factor.frame
    return macs
