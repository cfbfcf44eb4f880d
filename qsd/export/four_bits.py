"""Weights of 4 bits in ONNX files: integers from -8 to 7, and powers of two by axis that make signed bytes of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
_LEAST, _MOST = -8, 7
_FEWEST = 64  # The operations that unpack fewer weights take more room than they save.


@dataclass(frozen=True)
class FourBits:
    """Integers of 4 bits and factors that broadcast to their shape; their product are the weights.

    Attributes:
        integers: From -8 to 7.
        factors: Powers of two, also negative, one array for each axis that has any but ones.
    """

    integers: Integers
    factors: list[Integers]

    @classmethod
    def of(cls, weight: Integers) -> "FourBits | None":
        """Take factors out of weights, ``None`` if more than 4 bits are left.

        Args:
            weight: Weights of any shape.
        """
        integers, factors = weight, []
        for factor_of in (_common_power, _sign):
            for axis in range(weight.ndim):
                factor = factor_of(integers, axis)
                if (factor != 1).any():
                    factors.append(factor)
                    integers = integers // factor
        if weight.size < _FEWEST or integers.min() < _LEAST or integers.max() > _MOST:
            return None
        return cls(integers, factors)

    def packed(self) -> bytes:
        """Two integers in each byte, the first one in the low half, as ONNX stores them."""
        halves = self.integers.reshape(-1) & 15
        halves = np.append(halves, np.zeros(len(halves) % 2, np.int64)).reshape(-1, 2)
        return bytes((halves[:, 0] | halves[:, 1] << 4).astype(np.uint8).tobytes())


def _ends(integers: Integers, axis: int) -> tuple[Integers, Integers, tuple[int, ...]]:
    """By entry of an axis the least and the largest integer there, and the other axes."""
    others = tuple(other for other in range(integers.ndim) if other != axis)
    return integers.min(axis=others, keepdims=True), integers.max(axis=others, keepdims=True), others


def _common_power(integers: Integers, axis: int) -> Integers:
    """By entry of an axis the largest power of two that divides all integers there, 1 where 4 bits hold them."""
    low, high, others = _ends(integers, axis)
    digits = np.bitwise_or.reduce(integers, axis=others, keepdims=True)
    power = np.where(digits == 0, 1, digits & -digits)
    return np.where((low >= _LEAST) & (high <= _MOST), 1, power)


def _sign(integers: Integers, axis: int) -> Integers:
    """By entry of an axis -1 where the largest integer is 8, which is -8 turned around."""
    low, high, _ = _ends(integers, axis)
    return np.where((high == -_LEAST) & (low >= -_MOST), -1, 1)
