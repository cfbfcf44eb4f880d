"""From events to frames: counts of events by bin of time, polarity and pixel, and their augmentation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from qsd.errors import QsdError
from qsd.layers.frames import MAX_FRAMES
from qsd.limits import check_number
from qsd.reading.events import Events

Array = np.ndarray[Any, Any]
_FULL = 65535  # the largest count that frames store


@dataclass(frozen=True)
class Binning:
    """How the events of a recording become frames.

    Events are counted by bin, polarity and pixel. A pixel of the frame takes the events of all sensor pixels that lie
    in it.

    Attributes:
        frames: Number F of frames.
        img_size: Height and width of the frames.
        sensor: Height and width of the sensor; ``None`` takes those of each recording, from its largest coordinates.
        bin_ms: Length of a bin in milliseconds, from the first event on: events after the last bin are left out, and a
            short recording has empty frames at its end. ``None`` divides each recording into F bins of equal length.

    Raises:
        QsdError: For numbers that are out of range.
    """

    frames: int
    img_size: tuple[int, int]
    sensor: tuple[int, int] | None = None
    bin_ms: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.frames, bool) or not isinstance(self.frames, int):
            raise QsdError(f"frames={self.frames!r} is no whole number.")
        check_number("frames", self.frames, 1, MAX_FRAMES)
        check_number("bin_ms", self.bin_ms, 1e-3)

    def __call__(self, events: Events) -> Array:
        """Count events.

        Args:
            events: A recording.

        Returns:
            Counts ``[F, 2, H, W]``, uint16: darker pixels in channel 0, brighter ones in channel 1.

        Raises:
            ValueError: If an event lies outside of the sensor.
        """
        height, width = self.img_size
        shape = (self.frames, 2, height, width)
        if not len(events.t):
            return np.zeros(shape, dtype=np.uint16)
        rows, columns = self.sensor or (int(events.y.max()) + 1, int(events.x.max()) + 1)
        if int(events.y.max()) >= rows or int(events.x.max()) >= columns:
            raise ValueError(
                f"an event lies at x={int(events.x.max())}, y={int(events.y.max())}, outside of the sensor of "
                f"{columns}x{rows} pixels"
            )
        times = events.t - events.t[0]
        length = self.bin_ms * 1e3 if self.bin_ms is not None else (times[-1] + 1) / self.frames
        bins = np.floor_divide(times, length).astype(np.int64)
        x, y = events.x.astype(np.int64) * width // columns, events.y.astype(np.int64) * height // rows
        place = ((bins * 2 + events.p) * height + y) * width + x
        if self.bin_ms is not None:
            place = place[bins < self.frames]
        counts = np.bincount(place, minlength=int(np.prod(shape)))
        return np.minimum(counts, _FULL).astype(np.uint16).reshape(shape)


@dataclass(frozen=True)
class FrameAugmentation:
    """Chance that is the same for all frames of a sample. Counts stay whole numbers.

    Attributes:
        degrees: Greatest angle by which frames are turned.
        shift: Greatest shift, as share of height and width.
        scale: Greatest change of size, as share.
        hflip: Probability of the horizontal flip.
        drop: Greatest share of events that are dropped.

    Raises:
        QsdError: For numbers that are out of range.
    """

    degrees: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    hflip: float = 0.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        check_number("degrees", self.degrees, 0, 180)
        for name in ("shift", "scale", "hflip", "drop"):
            check_number(name, getattr(self, name), 0, 1)

    def __call__(self, frames: Tensor) -> Tensor:
        """Change a sample.

        Args:
            frames: Counts ``[F, 2, H, W]``, float32.

        Returns:
            Counts in the same shape.
        """
        turn, down, right, size = (2 * torch.rand(4) - 1).tolist()
        flip, drop = torch.rand(2).tolist()
        height, width = frames.shape[-2:]
        if self.degrees or self.shift or self.scale:
            shift = [round(right * self.shift * width), round(down * self.shift * height)]
            smooth = InterpolationMode.BILINEAR if self.degrees or self.scale else InterpolationMode.NEAREST
            frames = TF.affine(frames, turn * self.degrees, shift, 1 + size * self.scale, [0.0], smooth)
            # Rounded up with the probability of the fraction, so that thin edges keep their events.
            frames = (frames + torch.rand(frames.shape[1:])).floor() if self.degrees or self.scale else frames
        if flip < self.hflip:
            frames = frames.flip(-1)
        if self.drop:
            frames = torch.binomial(frames, torch.full_like(frames, 1 - drop * self.drop))
        return frames


def to_tensor(counts: Array) -> Tensor:
    """Counts as the network takes them.

    Args:
        counts: ``[F, 2, H, W]``, uint16.

    Returns:
        float32 in the same shape.
    """
    return torch.from_numpy(counts.astype(np.float32))
