"""Integers of a layer's weights, and what an accumulator of them has to be multiplied by to give spike counts (ours).

Integer convolutions of ONNX compute ``round((sum(w n) + b) m)`` with an integer bias b and one float m per channel. A
converted layer has a float bias. Where it is followed by a neuron, b and m can be chosen such that the neuron's count
comes out for every sum that spike counts can give: only the sums at which the count grows by one need to lie right.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd.errors import QsdError
from qsd.spiking import SpikingNetwork
from qsd.spiking.layers import Convolution

# x86 processors without VNNI add two products of 8 bits in 16 bits, and saturate.
_PAIR_LIMIT = 32767
_LEAST_GAP = 1e-5  # relative, between multipliers; a float32 has 6e-8


@dataclass
class IntegerWeights:
    """Weights of a layer as integers times a scale by output channel.

    Attributes:
        integers: ``[C_out, ...]``, of at most 8 bits, signed.
        scale: what one of them is worth, positive, float64 ``[C_out]``.
        bias: float64 ``[C_out]``.
        frame: pixels of the bias put around the output.
    """

    integers: NDArray[Any]
    scale: NDArray[Any]
    bias: NDArray[Any]
    frame: int = 0

    @classmethod
    def of(cls, layer: Convolution, key: str, name: str, spiking: SpikingNetwork) -> "IntegerWeights":
        """The integers behind a layer's folded weights.

        Args:
            layer: a convolution, or what else has a weight and a bias.
            key: of its weights in the trained model.
            name: for errors.
            spiking: the network.

        Raises:
            QsdError: for float weights, and a frame that is not the bias.
        """
        if getattr(layer, "scale", None) is not None:
            integers = layer.integers()
        elif key in spiking.trained.bits:
            integers = spiking.trained.tensors[key]
        else:
            raise QsdError(
                f"layer {name} has float weights: an integer file needs weights of 2 to 8 bits; train with "
                "weight_bits, or write floats (integer=False)."
            )
        whole = integers.cpu().double().numpy()
        folded, bias = layer.weight.cpu().double().numpy(), layer.bias.cpu().double().numpy()
        rows, values = whole.reshape(len(whole), -1), folded.reshape(len(whole), -1)
        squares = (rows**2).sum(1)
        scale = np.divide((rows * values).sum(1), squares, out=np.zeros_like(squares), where=squares > 0)
        sign = np.where(scale < 0, -1.0, 1.0)  # a batch norm may turn a channel around
        whole = np.where(scale == 0, 0.0, (sign * whole.T).T.reshape(len(whole), -1).T).T.reshape(whole.shape)
        scale = np.where(scale == 0, 1.0, np.abs(scale))
        frame = getattr(layer, "frame", None)
        if frame is not None and not (layer.weight.shape[-1] == 1 and np.allclose(frame.cpu().double().numpy(), bias)):
            raise QsdError(f"the frame of layer {name} is not what it makes of zeros; write floats (integer=False).")
        return cls(whole, scale, bias, 0 if frame is None else 1)

    def finer(self, largest_input: int) -> NDArray[Any]:
        """Powers of two by which a channel's integers can grow: the bias then has a finer grid.

        Args:
            largest_input: that they are multiplied by.
        """
        rows = self.integers.reshape(len(self.integers), -1)
        limit = min(127, _PAIR_LIMIT // (2 * largest_input))
        return 2.0 ** np.floor(np.log2(limit / np.maximum(np.abs(rows).max(1), 1)).clip(0))

    def room(self) -> float:
        """Largest power of two by which single integers can grow if the input has 8 bits."""
        largest = max(np.abs(self.integers).max(), 1)
        return float(2.0 ** max(np.floor(np.log2(_PAIR_LIMIT // (2 * 255) / largest)), 0))

    def levels(self) -> int:
        """Most levels that an 8-bit input may have without saturating pairs of products."""
        return min(255, int(_PAIR_LIMIT // (2 * max(np.abs(self.integers).max(), 1))))

    def taking(self, unit: NDArray[Any], depthwise: bool) -> "IntegerWeights":
        """The same layer for an input whose channels have units: what they are worth goes into the weights.

        Args:
            unit: of every channel, ``[C_in]``; powers of two times the smallest, unless the layer is depthwise.
            depthwise: every output channel sees its own input channel alone.
        """
        if depthwise:
            return replace(self, scale=self.scale * unit)
        relative = (unit / unit.min()).reshape(-1, *[1] * (self.integers.ndim - 2))
        return replace(self, integers=self.integers * relative, scale=self.scale * unit.min())


@dataclass
class Requantization:
    """Integers of a layer as an integer convolution takes them.

    Attributes:
        weight: int8 ``[C_out, ...]``.
        bias: int32 ``[C_out]``.
        multiplier: from the accumulator to units of the output, float32 ``[C_out]``.
    """

    weight: NDArray[Any]
    bias: NDArray[Any]
    multiplier: NDArray[Any]

    @classmethod
    def rounded(cls, weights: IntegerWeights, largest_input: int, unit: float | NDArray[Any]) -> "Requantization":
        """The bias rounded to the accumulator's grid.

        Args:
            weights: of the layer, for its input's units.
            largest_input: of the input's integers.
            unit: of the output, or of each of its channels.
        """
        finer = weights.finer(largest_input)
        accumulated = weights.scale / finer
        bias = np.rint(weights.bias / accumulated).clip(-(2**31), 2**31 - 1)
        return cls(_times(weights.integers, finer), bias.astype(np.int32), (accumulated / unit).astype(np.float32))

    @classmethod
    def counting(cls, weights: IntegerWeights, threshold: float, time_steps: int) -> "Requantization | None":
        """Spike counts in, exactly the neuron's spike counts out, or ``None`` if no bias and multiplier do that.

        Args:
            weights: of the layer.
            threshold: of the neuron behind.
            time_steps: T of both neurons.
        """
        rows = weights.integers.reshape(len(weights.integers), -1)
        low, high = time_steps * rows.clip(max=0).sum(1), time_steps * rows.clip(min=0).sum(1)
        finer = weights.finer(time_steps)
        half = np.arange(time_steps) + 0.5
        # The least sum with which the neuron fires k times, [C, T], as far as sums go.
        least = np.ceil((half * threshold - weights.bias[:, None]) / weights.scale[:, None])
        always, never = least <= low[:, None], least > high[:, None]
        nearest = np.rint(weights.bias * finer / weights.scale)
        best_bias = nearest.copy()
        best_gap, divisor = np.full_like(best_bias, -1.0), np.ones_like(best_bias)
        ideal = threshold * finer / weights.scale
        for offset in range(-int(finer.max()) // 2, int(finer.max()) // 2 + 1):
            bias = nearest + offset
            # The accumulator of k - 1/2 spikes has to lie between the neighbouring sums of k - 1 and of k spikes.
            below = (finer * np.where(never, high[:, None], least - 1).T + bias).T / half
            above = (finer * np.where(always, low[:, None], least).T + bias).T / half
            lower = np.where(always, 0.0, below).max(1).clip(1e-6)
            upper = np.where(never, 2 * np.maximum(lower, ideal)[:, None], above).min(1)
            gap = (upper - lower) / lower
            better = gap > best_gap
            middle = np.clip(ideal, lower + (upper - lower) / 4, np.maximum(upper - (upper - lower) / 4, lower))
            best_gap, best_bias = np.where(better, gap, best_gap), np.where(better, bias, best_bias)
            divisor = np.where(better, middle, divisor)
        if (best_gap < _LEAST_GAP).any() or (np.abs(best_bias) > 2**30).any():
            return None
        return cls(_times(weights.integers, finer), best_bias.astype(np.int32), (1 / divisor).astype(np.float32))


def _times(integers: NDArray[Any], factor: NDArray[Any]) -> NDArray[Any]:
    return (integers * factor.reshape(-1, *[1] * (integers.ndim - 1))).astype(np.int8)
