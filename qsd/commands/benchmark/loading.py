"""The share of its time that a training waits for images."""

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn import functional as F

from qsd.commands.benchmark.settings import Settings
from qsd.data import ImageFolderData
from qsd.layers.frames import channels_last


def write_images(root: Path, count: int) -> None:
    """Write random crops of scikit-learn's photographs as JPEG files of ImageNet's usual size, in two classes.

    Args:
        root: The folder for ``train`` and ``val``.
        count: The number of training images of each class.
    """
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    generator = np.random.default_rng(0)
    for part, number in (("train", count), ("val", 1)):
        for label, photograph in enumerate(photographs):
            folder = root / part / str(label)
            folder.mkdir(parents=True)
            for index in range(number):
                width = int(generator.integers(photograph.width // 2, photograph.width))
                height = width * photograph.height // photograph.width
                left = int(generator.integers(photograph.width - width + 1))
                top = int(generator.integers(photograph.height - height + 1))
                crop = photograph.crop((left, top, left + width, top + height)).resize((500, 375))
                crop.save(folder / f"{index}.jpg", quality=90)


def loading(model: nn.Module, settings: Settings) -> dict[str, Any]:
    """Train on JPEG files with ImageNet's augmentation, and measure the time that each step waits for its batch.

    Args:
        model: The model to train.
        settings: The settings of the benchmark.
    """
    with TemporaryDirectory() as folder:
        steps = settings.rounds + 1  # the first one starts the workers
        write_images(Path(folder), -(-steps * settings.batch_size // 2))
        data = ImageFolderData(folder, settings.img_size, settings.batch_size, settings.workers, seed=0)
        data.setup("fit")
        loader: Any = data.train_dataloader()
        batches = iter(loader)
        next(batches)
        start = time.perf_counter()
        alone = sum(len(images) for images, _ in batches) / (time.perf_counter() - start)
        waiting, training = train_steps(model, loader, steps, settings.device)
    return {
        "share_waiting": sum(waiting) / (sum(waiting) + sum(training)),
        "shares": [w / (w + t) for w, t in zip(waiting, training)],
        "seconds_waiting": median(waiting),
        "seconds_training": median(training),
        "images_per_second": alone,
        "workers": loader.num_workers,
    }


def train_steps(model: nn.Module, loader: Any, steps: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds that each step but the first waits for its batch, and seconds that it computes.

    Args:
        model: The model to train.
        loader: Batches of images or recordings, and labels.
        steps: Number of steps.
        device: The device to compute on.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    waiting, training = [], []
    batches, start = iter(loader), time.perf_counter()
    for _ in track(range(steps), "loading", console=Console(stderr=True)):
        images, labels = next(batches)
        loaded = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        images = channels_last(images.to(device))
        F.cross_entropy(model(images), labels.to(device)).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done = time.perf_counter()
        waiting.append(loaded - start)
        training.append(done - loaded)
        start = done
    return waiting[1:], training[1:]
