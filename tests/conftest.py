import gc
import importlib.util
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import qsd  # noqa: F401 - makes the model names known
from tests.helpers import DATA, ROOT
from tests.helpers.conversions import undraw


def pytest_collection_finish():
    """By now all libraries are imported: full collections need not walk over their million objects again."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without pictures, for tests of what is written in them."""
    undraw(monkeypatch)


@pytest.fixture(scope="session")
def tool():
    """Import a script of ``tools/`` by its name, beside its siblings, as running it would."""
    sys.path.append(str(ROOT / "tools"))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def reference_state():
    """A state dict of the published code, float32."""
    tensors = load_file(DATA / "qsd_reference_tiny.safetensors")
    return {n.removeprefix("state."): t.float() for n, t in tensors.items() if n.startswith("state.")}
