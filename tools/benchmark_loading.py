"""For how much of its time a training waits for images."""

import argparse
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

from qsd.data import ImageFolderData


def write_images(root: Path, count: int) -> None:
    """JPEG files of 500 x 375 pixels in two classes, ImageNet's usual size: random crops of scikit-learn's photographs.

    Args:
        root: where the folders ``train`` and ``val`` go.
        count: of each class, in training.
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


def loading(model: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Train on JPEG files with ImageNet's augmentation, and measure how long each step waits for its batch.

    Args:
        model: to train.
        options: of the benchmark.
    """
    with TemporaryDirectory() as folder:
        steps = options.rounds + 1  # the first one starts the workers
        write_images(Path(folder), -(-steps * options.batch_size // 2))
        data = ImageFolderData(folder, options.img_size, options.batch_size, options.workers, seed=0)
        data.setup("fit")
        loader = data.train_dataloader()
        batches = iter(loader)
        next(batches)
        start = time.perf_counter()
        alone = sum(len(images) for images, _ in batches) / (time.perf_counter() - start)

        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        waiting, training = [], []
        batches, start = iter(loader), time.perf_counter()
        for _ in track(range(steps), "loading", console=Console(stderr=True)):
            images, labels = next(batches)
            loaded = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            images = images.to(options.device, memory_format=torch.channels_last)
            F.cross_entropy(model(images), labels.to(options.device)).backward()
            optimizer.step()
            if options.device.type == "cuda":
                torch.cuda.synchronize(options.device)
            done = time.perf_counter()
            waiting.append(loaded - start)
            training.append(done - loaded)
            start = done
    shares = [w / (w + t) for w, t in zip(waiting[1:], training[1:])]
    return {
        "share_waiting": sum(waiting[1:]) / (sum(waiting[1:]) + sum(training[1:])),
        "shares": shares,
        "seconds_waiting": median(waiting[1:]),
        "seconds_training": median(training[1:]),
        "images_per_second": alone,
        "workers": loader.num_workers,
    }
