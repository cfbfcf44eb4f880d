"""Digits in front of an event camera: recordings without a download."""

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from qsd.data.base import Part
from qsd.data.events.base import EventData
from qsd.data.events.frames import FrameAugmentation
from qsd.data.events.pixels import PixelModel, record
from qsd.data.events.recordings import RecordingArrays
from qsd.limits import check_number
from qsd.reading.digits import FULL_SCALE, SIZES, load_digits
from qsd.reading.events import Events
from qsd.reading.splits import stratified_split

Array = np.ndarray[Any, Any]
SACCADE_MS = 50.0
# Where the digit is at the beginning and after each saccade, in shares of the picture's side: right and down.
_CORNERS = ((-0.06, -0.06), (0.06, 0.06), (0.06, -0.06), (-0.06, -0.06))
_SEED = 0  # of the pixels and their noise: the recordings are always the same


class DigitEvents(EventData):
    """The handwritten digits of scikit-learn, moved along three saccades in front of an event camera.

    The recordings are simulated (`qsd.data.events.pixels`), 150 ms each, and are the same every time. The parts are
    those of `qsd.data.DigitsData`: 1,197 to train, 200 to validate, 400 to test. The saccades form a triangle, as those
    of N-MNIST do, so that edges of every direction are seen.

    Args:
        frames: Number F of frames; each takes an equal part of the recording.
        img_size: Height and width of the sensor in pixels; one number for a square.
        batch_size: Recordings per step and process.
        num_workers: Loading processes per training process; 0 loads in the training process.
        degrees: Greatest angle by which training recordings are turned.
        shift: Greatest shift of training recordings, as share of the side.
        scale: Greatest change of size of training recordings, as share.
        drop: Greatest share of events that are dropped in training.
        threshold: Change of the log intensity for an event.
        refractory_ms: Time without events after an event of a pixel.
        noise_hz: Events of noise of a pixel per second.
        seed: Seed of order and augmentation; None takes that of ``seed_everything``, or 0.
    """

    def __init__(
        self,
        frames: int = 3,
        img_size: int | tuple[int, int] = 16,
        batch_size: int = 64,
        num_workers: int | None = 0,
        degrees: float = 10.0,
        shift: float = 0.06,
        scale: float = 0.1,
        drop: float = 0.1,
        threshold: float = 0.3,
        refractory_ms: float = 2.0,
        noise_hz: float = 0.2,
        seed: int | None = None,
    ) -> None:
        augmentation = FrameAugmentation(degrees, shift, scale, 0.0, drop)
        super().__init__(frames, img_size, batch_size, num_workers, augmentation=augmentation, seed=seed)
        check_number("threshold", threshold, 1e-3)
        check_number("refractory_ms", refractory_ms, 0)
        check_number("noise_hz", noise_hz, 0, 1e3)
        self.sensor = self.img_size
        self.pixels = PixelModel(threshold, refractory_ms=refractory_ms, noise_hz=noise_hz)
        self._parts: dict[Part, RecordingArrays] = {}

    @property
    def class_names(self) -> list[str]:
        """The digits "0" to "9"."""
        return [str(digit) for digit in range(10)]

    def load_part(self, part: Part) -> RecordingArrays:
        """Record and split the digits, once.

        Args:
            part: "train", "val" or "test".
        """
        if not self._parts:
            _, classes = load_digits()
            recordings = _record_digits(self.img_size, self.pixels)
            for name, indices in zip(SIZES, stratified_split(classes, list(SIZES.values()))):
                chosen = [recordings[index] for index in indices]
                names = [f"digit {index}" for index in indices]
                self._parts[name] = RecordingArrays(chosen, classes[indices], names, self.binning())
        return self._parts[part]


@lru_cache(maxsize=1)
def _record_digits(size: tuple[int, int], pixels: PixelModel) -> list[Events]:
    """Recordings of all digits, by a sensor of some height and width."""
    height, width = size
    images, _ = load_digits()
    digits = np.stack([_enlarged(image / FULL_SCALE, height, width) for image in images])

    def picture(now: float) -> Array:
        saccade = min(int(now / SACCADE_MS), 2)
        share = now / SACCADE_MS - saccade
        start, end = np.array(_CORNERS[saccade]), np.array(_CORNERS[saccade + 1])
        right, down = start + share * (end - start)
        return _moved(digits, down * height, right * width)

    return record(picture, 3 * SACCADE_MS, pixels, np.random.default_rng(_SEED))


def _enlarged(digit: Array, height: int, width: int) -> Array:
    """A digit ``[8, 8]`` with a dark frame of one pixel, in the middle of a dark picture."""
    inner = (width * 7 // 8, height * 7 // 8)
    grey = np.asarray(Image.fromarray(np.pad(digit, 1).astype(np.float32)).resize(inner, Image.Resampling.BILINEAR))
    picture = np.zeros((height, width), dtype=np.float32)
    top, left = (height - inner[1]) // 2, (width - inner[0]) // 2
    picture[top : top + inner[1], left : left + inner[0]] = grey.clip(0, 1)
    return picture


def _moved(pictures: Array, down: float, right: float) -> Array:
    """Pictures ``[N, H, W]`` with dark margins, shifted by parts of pixels, by linear interpolation."""
    for axis, shift in ((1, down), (2, right)):
        whole = int(np.floor(shift))
        part = np.float32(shift - whole)
        pictures = (1 - part) * np.roll(pictures, whole, axis) + part * np.roll(pictures, whole + 1, axis)
    return pictures
