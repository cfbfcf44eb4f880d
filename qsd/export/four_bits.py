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
        # Output channels are the first axis, or the second one of a matrix.
        if not (first := integers * _turned(integers, 0)).max() > _MOST:
            integers, rows = first, rows * _turned(integers, 0)
        else:
            integers, columns = integers * _turned(integers, 1), columns * _turned(integers, 1)
        if integers.min() < _LEAST or integers.max() > _MOST:
            return None
        return cls(integers, [factor for factor in (rows, columns) if (factor != 1).any()])

    def packed(self) -> bytes:
        """Two integers in each byte, the first one in the low half, as ONNX stores them."""
        halves = self.integers.reshape(-1) & 15
        halves = np.append(halves, np.zeros(len(halves) % 2, np.int64)).reshape(-1, 2)
        return bytes((halves[:, 0] | halves[:, 1] << 4).astype(np.uint8).tobytes())


def _turned(integers: Integers, axis: int) -> Integers:
    """By entry of an axis -1 where the integers hold 8, because a norm turned the channel around, and no -8."""
    others = tuple(other for other in range(integers.ndim) if other != axis)
    low, high = integers.min(axis=others, keepdims=True), integers.max(axis=others, keepdims=True)
    return np.where((high == -_LEAST) & (low > _LEAST), -1, 1)


def _powers(weight: Integers) -> tuple[Integers, Integers] | None:
    """Powers of two by entry of the first and of the second axis, whose product leaves integers from -8 to 8.

    There is an 8 only in entries of the first axis that cannot do without.
    """
    inner = tuple(range(2, weight.ndim))
    size, ends = np.abs(weight), [1] * len(inner)
    have = np.where(size == 0, _ANY_POWER, np.log2(np.maximum(size & -size, 1)).astype(np.int64)).min(axis=inner)
    turned = np.zeros((len(weight), 1, *ends), bool)
    while True:
        most = np.where(turned | (weight < 0), -_LEAST, _MOST)
        need = np.ceil(np.log2(np.maximum(size, 1) / most)).astype(np.int64).clip(0).max(axis=inner)
        rows, columns = _exponents(have, need)
        if (rows >= 0).all():
            return 2 ** rows.reshape(-1, 1, *ends), 2 ** columns.reshape(1, -1, *ends)
        # Those that ask for more than a column can give, or all that fail.
        greedy = (need - have.min(1, keepdims=True) > have.min(0)).any(1).reshape(turned.shape) & ~turned
        failed = greedy if greedy.any() else (rows < 0).reshape(turned.shape) & ~turned
        if not failed.any():
            return None
        turned |= failed


def _exponents(have: Integers, need: Integers) -> tuple[Integers, Integers]:
    """Exponents e by row and f by column with ``need <= e + f <= have``; an e below 0 if there are none.

    At first f is 0 and e as large as possible. Then f grows where it has to, and e falls, until all fits.

    Args:
        have: Largest sum of both.
        need: Least sum of both.
    """
    columns = np.zeros(have.shape[1], np.int64)
    silent = (have == _ANY_POWER).all(1)
    while True:
        rows = np.where(silent, 0, (have - columns).min(1))
        grown = np.maximum(columns, (need - rows[:, None]).max(0))
        if (rows < 0).any() or (grown == columns).all():
            return rows, columns
        columns = grown
