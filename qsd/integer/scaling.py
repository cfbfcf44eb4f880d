"""Real factors by channel as integers: tables of weights, and products with shifts around them."""

from dataclasses import dataclass

import numpy as np

from qsd.integer.signals import Floats, Integers

_LARGEST_ENTRY = 2**30
_LARGEST_MULTIPLIER = 2**23 - 1
_LARGEST_SHIFT = 30


def half(shift: int) -> int:
    """The addend with which a right shift rounds to the nearest integer, halves up.

    Args:
        shift: Places of the shift.
    """
    return 1 << (shift - 1) if shift else 0


@dataclass(frozen=True)
class Table:
    """The wide integers that weights of few bits stand for, ``(w m[c] + half) >> shift``.

    Attributes:
        multiplier: m by output channel.
        shift: Places of the shift.
    """

    multiplier: Integers
    shift: int

    @classmethod
    def of(cls, factor: Floats, bits: int) -> "Table":
        """The table whose entries are nearest to ``w * factor``.

        Args:
            factor: Real factor by output channel.
            bits: Width of the weights.
        """
        largest = float(np.abs(factor).max(initial=0.0)) * 2 ** (bits - 1)
        room = _LARGEST_ENTRY / largest if largest else 1.0
        shift = int(np.clip(np.floor(np.log2(max(room, 1.0))), 0, _LARGEST_SHIFT))
        return cls(np.rint(factor * 2.0**shift).astype(np.int64), shift)

    def entries(self, weight: Integers) -> Integers:
        """The entries of weights.

        Args:
            weight: ``[C_out, ...]``.
        """
        multiplier = self.multiplier.reshape(-1, *[1] * (weight.ndim - 1))
        return (weight * multiplier + half(self.shift)) >> self.shift

    def largest(self, bits: int) -> int:
        """The largest magnitude of an entry.

        Args:
            bits: Width of the weights.
        """
        ends = np.array([[-(2 ** (bits - 1)), 2 ** (bits - 1) - 1]]).repeat(len(self.multiplier), 0)
        return int(np.abs(self.entries(ends)).max(initial=0))


@dataclass(frozen=True)
class Rescaling:
    """``(a m[c] + half) >> shift``.

    Attributes:
        multiplier: m by channel, of at most 24 bits.
        shift: Places of the shift.
    """

    multiplier: Integers
    shift: int

    @classmethod
    def of(cls, factor: Floats) -> "Rescaling":
        """The rescaling whose multipliers are nearest to real factors.

        Args:
            factor: Real factor by channel.
        """
        steepest = max(float(np.abs(factor).max(initial=0.0)), 2.0**-_LARGEST_SHIFT)
        shift = int(np.clip(np.floor(np.log2(_LARGEST_MULTIPLIER / steepest)), 0, _LARGEST_SHIFT))
        return cls(np.rint(factor * 2.0**shift).astype(np.int64), shift)

    def products(self, values: Integers) -> Integers:
        """The products before the shift.

        Args:
            values: ``[C, ...]``.
        """
        return values * self.multiplier.reshape(-1, *[1] * (values.ndim - 1)) + half(self.shift)

    def apply(self, values: Integers) -> Integers:
        """The rescaled integers.

        Args:
            values: ``[C, ...]``.
        """
        return self.products(values) >> self.shift

    def error(self, factor: Floats, low: Integers, high: Integers) -> Floats:
        """Largest distance between the result and ``factor * a`` by channel, in units of the result.

        Args:
            factor: Real factor by channel.
            low: Least value by channel.
            high: Largest value by channel.
        """
        of_multiplier = np.abs(self.multiplier * 2.0**-self.shift - factor) * np.maximum(-low, high)
        return of_multiplier + (0.5 if self.shift else 0.0)
