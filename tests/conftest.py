import random

import numpy as np
import pytest
import torch
from PIL import Image

import qsd  # noqa: F401 - makes the model names known


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


def _write_tree(root, parts, size=(12, 10)):
    """parts: {"train": {"cat": 3}} writes train/cat/0.png ...; every image has one colour of its own."""
    number = 0
    for part, classes in parts.items():
        for name, count in classes.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                number += 1
                Image.new("RGB", size, (number % 256, (7 * number) % 256, 200)).save(folder / f"{index}.png")
    return root


@pytest.fixture
def write_tree():
    return _write_tree


@pytest.fixture
def tree(tmp_path):
    return _write_tree(tmp_path / "tree", {"train": {"cat": 5, "dog": 6}, "val": {"cat": 3, "dog": 2}})


@pytest.fixture
def truncated():
    """Cut a file in the middle of its pixels: the header stays intact."""

    def write(path):
        noise = np.random.RandomState(0).randint(0, 255, (40, 40, 3)).astype(np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path, "JPEG")
        path.write_bytes(path.read_bytes()[:800])
        return path

    return write
