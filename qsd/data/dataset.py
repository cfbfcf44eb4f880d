"""Sources of images, and the map-style data set that decodes, augments and normalises them."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from qsd.reading.images import BadImage, ExifOrientation, load_image

# Without an end, a data set of a million broken files would be read through once per sample before anyone is told.
_MAX_ATTEMPTS = 1000

# From a decoded image, or from the counts of a recording's events, to a tensor.
Transform = Callable[[Any], Tensor]


class ImageSource(Protocol):
    """Undecoded images with labels and names, by index."""

    labels: np.ndarray[Any, Any]

    def __len__(self) -> int: ...

    def load(self, index: int) -> Any:
        """Decode one image, or give the `BadImage` that tells why it cannot be read.

        Args:
            index: ``0..len - 1``.
        """

    def name(self, index: int) -> str:
        """The name of one image in a table of predictions.

        Args:
            index: ``0..len - 1``.
        """


class ImageFiles:
    """Image files on disk.

    Args:
        paths: The files.
        labels: Their classes; None if they are unknown.
        exif_orientation: The rule of `qsd.data.load_image`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int] | None = None,
        exif_orientation: ExifOrientation = "upright",
    ) -> None:
        self._orientation = exif_orientation
        # One block of bytes: workers that touch the reference counts of a million strings would each copy them all.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.asarray(labels if labels is not None else [-1] * len(paths), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def load(self, index: int) -> Image.Image | BadImage:
        """See `ImageSource`."""
        return load_image(self.name(index), self._orientation)

    def name(self, index: int) -> str:
        """The path of the file."""
        return os.fsdecode(bytes(self._paths[index]))


class ImageArray:
    """Images in memory.

    Args:
        images: uint8 ``[N, H, W]`` (grey) or ``[N, H, W, 3]`` (RGB).
        labels: Their classes ``[N]``.
        names: Their names.
    """

    def __init__(
        self, images: np.ndarray[Any, Any], labels: Sequence[int] | np.ndarray[Any, Any], names: Sequence[str]
    ) -> None:
        self._images = images
        self._names = names
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> Image.Image:
        """See `ImageSource`."""
        return Image.fromarray(self._images[index])

    def name(self, index: int) -> str:
        """See `ImageSource`."""
        return self._names[index]


class ImageSubset:
    """Some images of a source.

    Args:
        source: All images.
        indices: Numbers of the images that are taken ``[N]``.
    """

    def __init__(self, source: ImageSource, indices: np.ndarray[Any, Any]) -> None:
        self._source, self._indices = source, indices
        self.labels = source.labels[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, index: int) -> Image.Image | BadImage:
        """See `ImageSource`."""
        return self._source.load(int(self._indices[index]))

    def name(self, index: int) -> str:
        """See `ImageSource`."""
        return self._source.name(int(self._indices[index]))


class Sample(NamedTuple):
    """One item of an `ImageDataset`.

    Attributes:
        image: float32 ``[C, H, W]``; None where the image could not be read.
        target: The label or the name.
        bad: Images that could not be read on the way to this one.
    """

    image: Tensor | None
    target: int | str
    bad: list[BadImage]


class ImageDataset(Dataset[Sample]):
    """Decoded, transformed images of a source.

    For training (``seed`` given) the key is ``(epoch, index)``. The augmentation then is a function of the seed, the
    epoch and the index: not of the workers, the process, the batch size, or what was loaded before. A bare index means
    epoch 0.

    Args:
        source: Its images.
        transform: Function from the decoded image to float32 ``[C, H, W]``.
        seed: Seed of the augmentation; None for evaluation, where the transform is deterministic and
            the key a bare index.
        named: The target is the name instead of the label.
        replace_bad: An image that cannot be read is replaced by the next one that can, so that the number of samples
            stays what it is.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        seed: int | None = None,
        named: bool = False,
        replace_bad: bool = False,
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.named = named
        self.replace_bad = replace_bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[Sample]:
        """The samples of a batch. Random states are stored once for all: doing so takes as long as a small image."""
        with nullcontext() if self.seed is None else _random_states_kept():
            return [self._sample(key) for key in keys]

    def _sample(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        bad: list[BadImage] = []
        for attempt in range(min(len(self), _MAX_ATTEMPTS) if self.replace_bad else 1):
            candidate = (index + attempt) % len(self)
            loaded = self.source.load(candidate)
            if isinstance(loaded, BadImage):
                bad.append(loaded)
                continue
            if self.seed is not None:
                # The index asked for, not the candidate: else a replacement would equal the image that it repeats.
                seed_generators(self.seed, epoch, index)
            return Sample(self.transform(loaded), self._target(candidate), bad)
        return Sample(None, self._target(index), bad)

    def _target(self, index: int) -> int | str:
        return self.source.name(index) if self.named else int(self.source.labels[index])


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """In the training process, whose loop uses the generators that transforms draw from, restore them."""
    # timm draws from all three, numpy's legacy one included.
    states = None if get_worker_info() else (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])


def seed_generators(*key: int) -> None:
    """Seed the generators that transforms draw from.

    Args:
        key: Numbers that decide the seeds, for an image those of the training, the epoch and the image.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)  # noqa: NPY002
    # Not `torch.manual_seed`, which also seeds every GPU.
    torch.default_generator.manual_seed(int.from_bytes(words[:2].tobytes(), "little") >> 1)
