"""How fast the events of recordings become frames, and the share of its time that a training waits for them."""

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm

from qsd.commands.benchmark.loading import train_steps
from qsd.commands.benchmark.settings import Settings, with_one_output
from qsd.data import EventFolderData

_EVENTS, _SIDE, _FRAMES = 100_000, 128, 4


def _write_recordings(root: Path, count: int) -> None:
    """Write recordings of random events of a sensor of 128x128 pixels, in two classes.

    Args:
        root: The folder for ``train`` and ``val``.
        count: The number of training recordings of each class.
    """
    generator = np.random.default_rng(0)
    events = np.empty(_EVENTS, dtype=[("x", "<i2"), ("y", "<i2"), ("t", "<i8"), ("p", "?")])
    for part, number in (("train", count), ("val", 1)):
        for label in "ab":
            folder = root / part / label
            folder.mkdir(parents=True)
            for index in range(number):
                events["x"], events["y"] = generator.integers(0, _SIDE, (2, _EVENTS))
                events["t"], events["p"] = (
                    np.sort(generator.integers(0, 10**6, _EVENTS)),
                    generator.random(_EVENTS) < 0.5,
                )
                np.save(folder / f"{index}.npy", events)


def recordings(settings: Settings) -> dict[str, Any]:
    """Read recordings into frames, and train a network with membranes over frames on them.

    Args:
        settings: The settings of the benchmark.
    """
    model: Any = timm.create_model(
        settings.name, num_classes=settings.num_classes, time_steps=settings.time_steps, in_chans=2, frames=_FRAMES,
        over_frames="membrane", events=True,
    )  # fmt: skip
    model = with_one_output(model).to(settings.device)
    with TemporaryDirectory() as folder:
        steps = settings.rounds + 1  # the first one starts the workers
        _write_recordings(Path(folder), -(-steps * settings.batch_size // 2))
        data = EventFolderData(folder, _FRAMES, settings.img_size, _SIDE, settings.batch_size, settings.workers, seed=0)
        source = data.load_part("val")
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            source.load(0)
            seconds.append(time.perf_counter() - start)
        waiting, training = train_steps(model, data.train_dataloader(), steps, settings.device)
    return {
        "events_per_second": _EVENTS / median(seconds),
        "share_waiting": sum(waiting) / (sum(waiting) + sum(training)),
        "seconds_waiting": median(waiting),
        "seconds_training": median(training),
    }
