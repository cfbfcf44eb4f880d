"""The convolutions of a chain as integer ONNX files hold them: integers, scales, biases and attributes."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd.integer.weights import IntegerWeights, chain_weights, evaluated_convolutions
from qsd.spiking import SpikingNetwork
from qsd.spiking.layers import Convolution, SpikingChain
from qsd.spiking.layers.geometry import Pair


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
        rows, columns = convolution.padding if hands_on else convolution.outer_padding
        if handed is not None:
            weights = replace(weights, bias=weights.bias + weights.response(handed))
            rows, columns = ((first + 1, last + 1) for first, last in (rows, columns))
        handed = weights.bias if hands_on else None
        if hands_on:
            weights = replace(weights, bias=np.zeros_like(weights.bias))
        factors[key] = ChainFactor(weights, _attributes(convolution, rows, columns))
    return factors


def _attributes(convolution: Convolution, rows: Pair, columns: Pair) -> dict[str, Any]:
    """The attributes of ONNX's ``Conv``, with padding above and below, and to the left and to the right."""
    geometry = {
        "kernel_shape": list(convolution.weight.shape[-2:]),
        "strides": list(convolution.stride),
        "pads": [rows[0], columns[0], rows[1], columns[1]],
        "group": convolution.groups,
    }
    return geometry if convolution.dilation == (1, 1) else {**geometry, "dilations": list(convolution.dilation)}
