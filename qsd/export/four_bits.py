"""Weights of 4 bits in ONNX files: integers from -8 to 7, and powers of two by axis that make signed bytes of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
_LEAST, _MOST = -8, 7
_FEWEST = 64  # The operations that unpack fewer weights take more room than they save.
_ANY_POWER = 62  # Zero is a multiple of all powers of two.


@dataclass(frozen=True)
class FourBits:
    """Integers of 4 bits and factors that broadcast to their shape; their product are the weights.

    Attributes:
        integers: From -8 to 7.
        factors: Powers of two, also negative, by entry of the first axis and by entry of the second; those that are all
            ones are left out.
    """

    integers: Integers
    factors: list[Integers]

    @classmethod
    def of(cls, weight: Integers) -> "FourBits | None":
        """Take factors out of weights, ``None`` if more than 4 bits are left.

        Args:
            weight: Weights of two or more axes.
        """
        powers = None if weight.size < _FEWEST else _powers(weight)
        if powers is None:
            return None
        rows, columns = powers
        integers = weight // (rows * columns)
        # A channel that was turned around may hold 8.
        signs = np.where(_largest(integers, 0) > _MOST, -1, 1)
        integers, rows = integers * signs, rows * signs
        if integers.min() < _LEAST or integers.max() > _MOST:
            signs = np.where(_largest(integers, 1) > _MOST, -1, 1)
            integers, columns = integers * signs, columns * signs
        if integers.min() < _LEAST or integers.max() > _MOST:
            return None
        return cls(integers, [factor for factor in (rows, columns) if (factor != 1).any()])

    def packed(self) -> bytes:
        """Two integers in each byte, the first one in the low half, as ONNX stores them."""
        halves = self.integers.reshape(-1) & 15
        halves = np.append(halves, np.zeros(len(halves) % 2, np.int64)).reshape(-1, 2)
        return bytes((halves[:, 0] | halves[:, 1] << 4).astype(np.uint8).tobytes())


def _largest(integers: Integers, axis: int) -> Integers:
    """The largest integer by entry of an axis, to be broadcast."""
    return integers.max(axis=tuple(other for other in range(integers.ndim) if other != axis), keepdims=True)


def _powers(weight: Integers) -> tuple[Integers, Integers] | None:
    """Powers of two by entry of the first and of the second axis, whose product leaves integers from -8 to 8.

    The exponents e of an entry of the first axis and f of one of the second have to fulfil ``need <= e + f <= have``,
    with the exponent of two that a weight has at most, and the one that it needs to be divided by. At first f is 0 and
    e as large as possible. Then f grows where it has to, and e falls, until all fits.
    """
    inner = tuple(range(2, weight.ndim))
    size = np.abs(weight)
    powers = np.where(size == 0, _ANY_POWER, np.log2(np.maximum(size & -size, 1)).astype(np.int64))
    needed = np.ceil(np.log2(np.maximum(size, 1) / -_LEAST)).astype(np.int64).clip(0)
    have, need = powers.min(axis=inner), needed.max(axis=inner)
    columns = np.zeros(weight.shape[1], np.int64)
    while True:
        rows = (have - columns).min(1).clip(max=need.max(1))
        grown = np.maximum(columns, (need - rows[:, None]).max(0))
        if rows.min() < 0:
            return None
        if (grown == columns).all():
            break
        columns = grown
    ends = [1] * len(inner)
    return 2 ** rows.reshape(-1, 1, *ends), 2 ** columns.reshape(1, -1, *ends)
