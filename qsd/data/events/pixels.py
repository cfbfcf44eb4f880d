"""A model of the pixels of an event camera: events of a picture that moves in front of it.

A pixel compares the logarithm of its intensity with the value at its last event. When the difference reaches its
threshold, it reports an event, brighter or darker, and moves its reference by one threshold. It then rests for its
refractory time. Thresholds differ from pixel to pixel, and single events come from noise. (Lichtsteiner, Posch and
Delbruck, "A 128x128 120 dB 15 us latency asynchronous temporal contrast vision sensor", IEEE Journal of Solid-State
Circuits, 2008; the values here are this package's own.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qsd.reading.events import Events

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PixelModel:
    """Properties of the pixels.

    Attributes:
        threshold: Change of the log intensity for an event.
        mismatch: Standard deviation of the threshold from pixel to pixel, as share.
        refractory_ms: Time without events after an event.
        dark: Intensity that is added to the picture's 0 to 1: that of the ambient light, below which nothing is seen.
        noise_hz: Events of noise of a pixel per second.
        step_ms: Time step of the simulation.
    """

    threshold: float = 0.3
    mismatch: float = 0.05
    refractory_ms: float = 2.0
    dark: float = 0.1
    noise_hz: float = 0.2
    step_ms: float = 1.0


def record(
    picture: Callable[[float], Array], duration_ms: float, model: PixelModel, generator: np.random.Generator
) -> list[Events]:
    """Record moving pictures, one recording for each.

    Args:
        picture: Gives the intensities 0 to 1 at a time in milliseconds, ``[N, H, W]``.
        duration_ms: Length of the recordings.
        model: Properties of the pixels.
        generator: Source of the pixels' differences and of noise.

    Returns:
        N recordings, with times in microseconds.
    """
    reference = np.log(picture(0.0) + np.float32(model.dark))
    shape = reference.shape
    differences = model.mismatch * generator.standard_normal(shape, dtype=np.float32)
    threshold = np.float32(model.threshold) * (1 + differences).clip(0.5, 1.5)
    rested = np.zeros(shape, dtype=np.float32)
    steps, noise = round(duration_ms / model.step_ms), model.noise_hz * model.step_ms / 1e3
    found: list[tuple[Array, Array, Array, Array, Array]] = []
    for step in range(1, steps + 1):
        now = step * model.step_ms
        change = np.log(picture(now) + np.float32(model.dark)) - reference
        fires = (np.abs(change) >= threshold) & (rested <= now)
        sign = np.sign(change)
        reference += fires * sign * threshold
        place = generator.integers(fires.size, size=generator.poisson(noise * fires.size))
        place = place[~fires.flat[place] & (rested.flat[place] <= now)]
        sign.flat[place] = generator.choice((-1.0, 1.0), len(place))
        fires.flat[place] = True
        rested[fires] = now + model.refractory_ms
        number, y, x = np.nonzero(fires)
        found.append((number, x, y, np.full(len(x), now * 1e3), sign[fires] > 0))
    number, x, y, t, p = (np.concatenate(parts) for parts in zip(*found))
    order = np.argsort(number, kind="stable")
    bounds = np.searchsorted(number[order], np.arange(1, shape[0]))
    fields = [
        np.split(field[order].astype(kind), bounds)
        for field, kind in ((x, np.int32), (y, np.int32), (t, np.float64), (p, np.int32))
    ]
    return [Events(*parts) for parts in zip(*fields)]
