"""Images as bytes: the normalisation of a network as a table of 256 integers by channel."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsd.errors import QsdError
from qsd.integer.description import PIXEL_LEVELS
from qsd.integer.signals import Floats, Integers

Bytes = NDArray[np.uint8]
_LARGEST_LEVEL = PIXEL_LEVELS - 1
_LARGEST_FACTOR = 256
_EXACT = 1e-6  # In pixel levels.


@dataclass(frozen=True)
class PixelGrid:
    """The real values of bytes, ``(p / 255 - mean) / std`` by channel.

    Attributes:
        mean: By channel.
        std: By channel, positive.
        events: Whether bytes are counts of events, which stand for themselves.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    events: bool = False

    @classmethod
    def of_events(cls, images: Tensor) -> "PixelGrid":
        """The grid of counts of events.

        Args:
            images: ``[B, C, H, W]``.
        """
        return cls((0.0,) * images.shape[1], (1 / _LARGEST_LEVEL,) * images.shape[1], events=True)

    @classmethod
    def of(cls, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> "PixelGrid":
        """The grid of a normalisation, or one grid for all channels that holds the images and their zero.

        Args:
            images: ``[B, C, H, W]``.
            mean: Mean by channel of the normalisation, ``None`` if it is unknown.
            std: Standard deviation by channel of the normalisation, ``None`` if it is unknown.

        Raises:
            QsdError: If one of them is missing or does not fit the images.
        """
        channels = images.shape[1]
        if (mean is None) != (std is None):
            raise QsdError("the normalisation needs both a mean and a std; give both, or none.")
        if mean is not None and std is not None:
            if not len(mean) == len(std) == channels or not all(value > 0 for value in std):
                raise QsdError(
                    f"mean={tuple(mean)} and std={tuple(std)} are no normalisation of {channels} channels; give one "
                    "mean and one positive std for each."
                )
            return cls(tuple(map(float, mean)), tuple(map(float, std)))
        low, high = min(float(images.min()), 0.0), max(float(images.max()), 0.0)
        step = max(high - low, 1e-6) / _LARGEST_LEVEL
        zero = round(-low / step)
        return cls((zero / _LARGEST_LEVEL,) * channels, (1 / (_LARGEST_LEVEL * step),) * channels)

    def pixels(self, images: Tensor) -> Bytes:
        """The bytes nearest to normalised images, ``[B, C, H, W]``.

        Args:
            images: ``[B, C, H, W]``.
        """
        mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (self.mean, self.std))
        levels = ((images.detach().cpu().double() * std + mean) * _LARGEST_LEVEL).round()
        return levels.clamp(0, _LARGEST_LEVEL).to(torch.uint8).numpy()

    def images(self, pixels: Bytes) -> Tensor:
        """The normalised images of bytes, float64 ``[B, C, H, W]``.

        Args:
            pixels: ``[B, C, H, W]``.
        """
        mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (self.mean, self.std))
        return (torch.from_numpy(pixels).double() / _LARGEST_LEVEL - mean) / std

    def table(self) -> tuple[Integers, Floats, Floats, Floats]:
        """The integers of all bytes ``[C, 256]``, the value of one unit, and offset and largest error by channel.

        Zero stands for zero as nearly as possible, because borders are padded with it: a level is A integers, with the
        A from 1 to 256 for which the levels of the means are nearest to integers. An offset makes up for the rest.
        """
        mean, std = np.array(self.mean)[:, None], np.array(self.std)[:, None]
        exact = (np.arange(PIXEL_LEVELS) - _LARGEST_LEVEL * mean) * (std.max() / std)
        factors = np.arange(1, _LARGEST_FACTOR + 1)
        misses = (
            np.abs(exact * factors[:, None, None] - np.rint(exact * factors[:, None, None])) / factors[:, None, None]
        )
        worst = misses.max((1, 2))
        factor = int(factors[np.argmax(worst <= max(worst.min(), _EXACT))])
        table = np.rint(exact * factor)
        missed = exact - table / factor
        offset, unit = missed.mean(1), float(1 / (_LARGEST_LEVEL * std.max()))
        error = np.abs(missed - offset[:, None]).max(1)
        return table.astype(np.int64), np.full(1, unit / factor), offset * unit, error * unit
