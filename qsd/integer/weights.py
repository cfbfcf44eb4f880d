"""The integers of a converted layer's weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd.errors import QsdError
from qsd.spiking import SpikingNetwork
from qsd.spiking.layers import Convolution, SpikingChain

# x86 processors without VNNI add two products of 8 bits in 16 bits, and saturate.
PAIR_LIMIT = 32767


@dataclass(frozen=True)
class TrainedIntegers:
    """Weights of a layer as the integers of the training (or of the merging), times a scale by output channel.

    Attributes:
        integers: ``[C_out, ...]``.
        scale: Value of one unit of the integers, with the sign of the norm behind the layer; 0 for a channel that a
            norm silences. float64 ``[C_out]``.
        bias: float64 ``[C_out]``.
        bits: Width of the integers.
        framed: Whether one pixel of the bias is put around the output.
    """

    integers: NDArray[np.int64]
    scale: NDArray[np.float64]
    bias: NDArray[np.float64]
    bits: int
    framed: bool

    @classmethod
    def of(cls, layer: Any, key: str, name: str, spiking: SpikingNetwork) -> "TrainedIntegers":
        """Recover the integers from a layer's weights, see `IntegerWeights.of`.

        Raises:
            QsdError: For float weights, and for a frame that is not the bias.
        """
        if getattr(layer, "scale", None) is not None:
            assert spiking.merged_bits is not None
            integers, bits = layer.integers(), spiking.merged_bits
        elif key in spiking.trained.bits:
            integers, bits = spiking.trained.tensors[key], spiking.trained.bits[key]
        else:
            raise QsdError(
                f"layer {name} has float weights: an integer file needs weights of 2 to 8 bits; train with "
                "weight_bits, or write floats (integer=False)."
            )
        whole = integers.cpu().numpy().astype(np.int64)
        folded, bias = layer.weight.cpu().double().numpy(), layer.bias.cpu().double().numpy()
        frame = getattr(layer, "frame", None)
        if frame is not None and not (layer.weight.shape[-1] == 1 and np.allclose(frame.cpu().double().numpy(), bias)):
            raise QsdError(f"the frame of layer {name} is not its response to zeros; write floats (integer=False).")
        return cls(whole, _scale_between(whole.astype(np.float64), folded), bias, bits, frame is not None)


@dataclass
class IntegerWeights:
    """Weights of a layer as integers times a scale by output channel.

    Attributes:
        integers: ``[C_out, ...]``, signed, of at most 8 bits.
        scale: Value of one unit of the integers, positive, float64 ``[C_out]``.
        bias: float64 ``[C_out]``.
        frame: Pixels of the bias put around the output.
    """

    integers: NDArray[Any]
    scale: NDArray[Any]
    bias: NDArray[Any]
    frame: int = 0

    @classmethod
    def of(cls, layer: Any, key: str, name: str, spiking: SpikingNetwork) -> "IntegerWeights":
        """Recover the integers from a layer's weights, into which norms and amplitudes were folded.

        Args:
            layer: A convolution, or another module with a ``weight`` ``[C_out, ...]`` and a ``bias`` ``[C_out]``.
            key: Name of its weights in the trained model.
            name: Name of the layer, for error messages.
            spiking: The network.

        Raises:
            QsdError: For float weights, and for a frame that is not the bias.
        """
        trained = TrainedIntegers.of(layer, key, name, spiking)
        # A batch norm of negative gain turns a channel around. The integers take the sign, so that scales are
        # positive; a channel of gain 0 gets zeros and any scale.
        whole = times_channels(np.sign(trained.scale), trained.integers.astype(np.float64))
        scale = np.where(trained.scale == 0, 1.0, np.abs(trained.scale))
        return cls(whole, scale, trained.bias, 1 if trained.framed else 0)

    def finer(self, largest_input: int) -> NDArray[Any]:
        """Powers of two ``[C_out]`` by which a channel's integers can grow, which gives its bias a finer grid.

        Args:
            largest_input: Largest input value that the integers are multiplied by.
        """
        rows = self.integers.reshape(len(self.integers), -1)
        limit = min(127, PAIR_LIMIT // (2 * largest_input))
        return 2.0 ** np.floor(np.log2(limit / np.maximum(np.abs(rows).max(1), 1)).clip(0))

    def room(self) -> float:
        """Largest power of two by which single integers can grow if the input has 8 bits."""
        largest = max(np.abs(self.integers).max(), 1)
        return float(2.0 ** max(np.floor(np.log2(PAIR_LIMIT // (2 * 255) / largest)), 0))

    def levels(self) -> int:
        """Most levels that an 8-bit input may have without saturating pairs of products."""
        return min(255, int(PAIR_LIMIT // (2 * max(np.abs(self.integers).max(), 1))))

    def response(self, constant: NDArray[Any]) -> NDArray[Any]:
        """The currents ``[C_out]`` of an input that is constant in every channel, without the bias.

        Args:
            constant: Value of every input channel, ``[C_in]``.
        """
        taps = self.integers.reshape(*self.integers.shape[:2], -1).sum(2)
        groups = constant.reshape(-1, taps.shape[1])
        return self.scale * (taps * groups.repeat(len(taps) // len(groups), 0)).sum(1)

    def taking(self, unit: NDArray[Any], depthwise: bool) -> "IntegerWeights":
        """The same layer for an input of integer levels: the value of one level is moved into the weights.

        Args:
            unit: Value of one level of every input channel, ``[C_in]``; powers of two times the smallest, unless the
                layer is depthwise.
            depthwise: Whether every output channel sees its own input channel alone.
        """
        if depthwise:
            return replace(self, scale=self.scale * unit)
        relative = (unit / unit.min()).reshape(-1, *[1] * (self.integers.ndim - 2))
        return replace(self, integers=self.integers * relative, scale=self.scale * unit.min())


def times_channels(factor: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """Multiply each output channel of ``[C_out, ...]`` by its own factor.

    Args:
        factor: ``[C_out]``.
        values: ``[C_out, ...]``.
    """
    return values * factor.reshape(-1, *[1] * (values.ndim - 1))


def _scale_between(trained: NDArray[Any], folded: NDArray[Any]) -> NDArray[Any]:
    """The scale ``[C_out]`` with ``folded = scale * trained`` by channel, by least squares; 0 for channels of zeros."""
    rows, values = trained.reshape(len(trained), -1), folded.reshape(len(trained), -1)
    squares = (rows**2).sum(1)
    return np.divide((rows * values).sum(1), squares, out=np.zeros_like(squares), where=squares > 0)


def evaluated_convolutions(chain: SpikingChain) -> Mapping[str, Convolution]:
    """The convolutions that the count domain evaluates, by name, in the order of application.

    Args:
        chain: A chain of the network.
    """
    if chain.merged is not None and chain.merged_counts:
        return {"merged": chain.merged}
    return chain.convolutions


def chain_weights(chain: SpikingChain, key: str, spiking: SpikingNetwork) -> IntegerWeights:
    """The integers of one convolution of a chain.

    Args:
        chain: A chain of the network.
        key: Name of the convolution, as `evaluated_convolutions` gives it.
        spiking: The network.

    Raises:
        QsdError: See `IntegerWeights.of`.
    """
    return IntegerWeights.of(evaluated_convolutions(chain)[key], weight_name(chain, key, spiking), chain.name, spiking)


def weight_name(chain: SpikingChain, key: str, spiking: SpikingNetwork) -> str:
    """The name in the trained model of the weights of one convolution of a chain.

    Args:
        chain: A chain of the network.
        key: Name of the convolution, as `evaluated_convolutions` gives it.
        spiking: The network.
    """
    name = f"{chain.name}.{key}.weight"
    # A convolution by itself has the name of its chain.
    return name if name in spiking.trained.tensors else f"{chain.name}.weight"
