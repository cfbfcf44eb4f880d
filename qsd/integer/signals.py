"""Signals of an integer network while it is built: shape, proved range, and the real values that integers stand for."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

# Spike counts; bytes of an image; sums of weighted spikes; products of counts. Inner values lie between the
# convolutions of a chain, and are multiplied.
Content = Literal["counts", "image", "currents", "product"]


@dataclass(frozen=True)
class Signal:
    """An integer array a for each image, which stands for the real values ``unit * a + offset``.

    All arrays have one entry by channel, the first axis of the shape, or a single one for all.

    Attributes:
        name: Name of the layer that gives it.
        shape: Shape for one image.
        content: Kind of its values.
        low: Least value of its integers.
        high: Largest value of its integers.
        unit: Real value of one unit; negative where a norm turns a channel around.
        offset: Real value of zero.
        error: Largest distance of the real value from the one of the network with floats, for equal spikes before.
        multiplied: Whether it was computed from the image without a neuron between.
    """

    name: str
    shape: tuple[int, ...]
    content: Content
    low: Integers
    high: Integers
    unit: Floats
    offset: Floats
    error: Floats
    multiplied: bool = False

    @classmethod
    def of_counts(cls, name: str, shape: tuple[int, ...], time_steps: int) -> "Signal":
        """Spike counts from 0 to T.

        Args:
            name: Name of the layer that gives them.
            shape: Shape for one image.
            time_steps: T.
        """
        zero = np.zeros(1)
        return cls(name, shape, "counts", np.zeros(1, np.int64), np.full(1, time_steps), np.ones(1), zero, zero)

    def by_channel(self, values: NDArray[Any]) -> NDArray[Any]:
        """One entry for each channel.

        Args:
            values: An array of this signal.
        """
        return np.broadcast_to(values, (self.shape[0],))

    def renamed(self, name: str, shape: tuple[int, ...]) -> "Signal":
        """The same values under another name and in another shape.

        Args:
            name: The new name.
            shape: The new shape.
        """
        return replace(self, name=name, shape=shape)

    @property
    def uniform(self) -> bool:
        """Whether all channels have the same range, unit and offset."""
        arrays = (self.low, self.high, self.unit, self.offset, self.error)
        return all(bool((values == values.flat[0]).all()) for values in arrays)
