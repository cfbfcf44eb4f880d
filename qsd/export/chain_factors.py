"""The convolutions of a chain as integer ONNX files hold them: integers, scales, biases and attributes."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd.integer.weights import IntegerWeights, chain_weights, evaluated_convolutions
from qsd.spiking import SpikingNetwork
from qsd.spiking.layers import Convolution, SpikingChain


@dataclass(frozen=True)
class ChainFactor:
    """One convolution.

    Attributes:
        weights: Its integers, scales and biases.
        geometry: The attributes of ONNX's ``Conv``.
    """

    weights: IntegerWeights
    geometry: dict[str, Any]


def hands_bias_on(factor: Convolution, after: Convolution) -> bool:
    """Whether the next convolution takes over the bias of a convolution whose output has a frame.

    The frame is the bias. Without the bias it is zero, so that the next convolution pads its input with zeros, and
    nothing is computed for the frame. That is right where the next convolution has no border of zeros of its own.

    Args:
        factor: A convolution of a chain.
        after: The next one.
    """
    return factor.frame is not None and not np.any(after.padding)


def chain_factors(chain: SpikingChain, spiking: SpikingNetwork) -> dict[str, ChainFactor]:
    """The convolutions that the count domain evaluates, in the order of application.

    Args:
        chain: A chain of the network.
        spiking: The network.

    Raises:
        QsdError: See `IntegerWeights.of`.
    """
    convolutions = evaluated_convolutions(chain)
    keys, factors = [*convolutions], dict[str, ChainFactor]()
    handed: NDArray[np.float64] | None = None
    for key, after in zip(keys, [*keys[1:], None]):
        convolution, weights = convolutions[key], chain_weights(chain, key, spiking)
        hands_on = after is not None and hands_bias_on(convolution, convolutions[after])
        padding = convolution.padding if hands_on else convolution.outer_padding
        if handed is not None:
            weights = replace(weights, bias=weights.bias + weights.response(handed))
            padding = tuple((first + 1, last + 1) for first, last in padding)
        handed = weights.bias if hands_on else None
        if hands_on:
            weights = replace(weights, bias=np.zeros_like(weights.bias))
        factors[key] = ChainFactor(weights, _attributes(convolution, padding))
    return factors


def _attributes(convolution: Convolution, padding: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """The attributes of ONNX's ``Conv``."""
    (top, bottom), (left, right) = padding
    geometry = {
        "kernel_shape": list(convolution.weight.shape[-2:]),
        "strides": list(convolution.stride),
        "pads": [top, left, bottom, right],
        "group": convolution.groups,
    }
    return geometry if convolution.dilation == (1, 1) else {**geometry, "dilations": list(convolution.dilation)}
