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
        for axis in range(weight.ndim):
            factor = _common_factor(integers, axis)
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


def _common_factor(integers: Integers, axis: int) -> Integers:
    """By entry of an axis the largest power of two that divides all integers there, negative to make an 8 a -8.

    Entries that need no more than 4 bits keep their integers.
    """
    others = tuple(other for other in range(integers.ndim) if other != axis)
    low, high = integers.min(axis=others, keepdims=True), integers.max(axis=others, keepdims=True)
    bits = np.bitwise_or.reduce(integers, axis=others, keepdims=True)
    divisor = np.where(bits == 0, 1, bits & -bits)
    divisor = np.where((low >= _LEAST) & (high <= _MOST), 1, divisor)
    turned = (high // divisor == -_LEAST) & (low // divisor >= -_MOST)
    return np.where(turned, -divisor, divisor)
