"""Shapes of convolutions, from which their operations are counted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Shape of a convolution.

    Attributes:
        channels: Channels of the output.
        inputs: Channels that one output sees.
        kernel: Side of the kernel.
        stride: Stride of the kernel.
        padding: Padding around the input.
        groups: Groups of channels.
        frame: Pixels put around the output.
    """

    channels: int
    inputs: int
    kernel: int
    stride: int
    padding: int
    groups: int = 1
    frame: int = 0

    @classmethod
    def merged(cls, factors: "Sequence[Geometry]") -> "Geometry":
        """The shape of the one convolution that equals a chain.

        Args:
            factors: Shapes of the chain's convolutions, in order.
        """
        if len(factors) == 1:
            return factors[0]
        core = max(factors, key=lambda factor: factor.kernel)
        padding = core.padding + max(factor.frame for factor in factors)
        stride = math.prod(factor.stride for factor in factors)
        return cls(factors[-1].channels, factors[0].inputs * factors[0].groups, core.kernel, stride, padding)

    def reach(self, length: int) -> Tensor:
        """By input position along one side, the number of output positions that see it, ``[length]``.

        Args:
            length: Length of the input's side.
        """
        first = torch.arange(self.size(length)) * self.stride - self.padding
        positions = torch.arange(length)[:, None]
        return ((positions >= first) & (positions < first + self.kernel)).sum(1)

    def size(self, length: int) -> int:
        """Side of the output, without a frame.

        Args:
            length: Length of the input's side.
        """
        return (length + 2 * self.padding - self.kernel) // self.stride + 1


def fan_out(size: tuple[int, int], geometry: Geometry) -> Tensor:
    """Synapses of an input pixel, borders included: the number of outputs that one spike is added to, ``[H, W]``.

    Args:
        size: Height and width of the input.
        geometry: Shape of the convolution; weights that are zero count as synapses.
    """
    height, width = size
    return geometry.channels // geometry.groups * torch.outer(geometry.reach(height), geometry.reach(width))


def dense_macs(factors: Sequence[Geometry], height: int, width: int) -> list[float]:
    """Multiply-accumulates of each factor for one image as papers count them, positions in the padding included.

    Args:
        factors: Shapes of convolutions in a row.
        height: Height of the first one's input.
        width: Width of the first one's input.
    """
    macs = []
    for factor in factors:
        height, width = factor.size(height), factor.size(width)
        macs.append(float(factor.channels * factor.inputs * factor.kernel**2 * height * width))
        height, width = height + 2 * factor.frame, width + 2 * factor.frame
    return macs
