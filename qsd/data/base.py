"""Base of all data modules: the three parts of a data set, their loaders, and the checks of arguments."""

import os
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from lightning import LightningDataModule

from qsd.data.dataset import ImageDataset, ImageFiles, ImageSource, Transform
from qsd.data.files import find_images
from qsd.data.loading import BadImagePolicy, ImageLoader, TrainLoader
from qsd.data.resuming import finish_loaded_epoch
from qsd.data.sampling import EvalSampler, TrainSampler
from qsd.errors import QsdError
from qsd.limits import LARGEST_SEED, check_number
from qsd.reading.images import ExifOrientation, check_orientation

Part = Literal["train", "val", "test"]

_PARTS: dict[str | None, tuple[Part, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
    None: ("train", "val", "test"),
}


class ImageData(LightningDataModule, ABC):
    """Images and their classes, for one classifier.

    Batches for training, validation and test are ``(images, labels)``: float32 ``[B, C, H, W]``, normalised, and int64
    ``[B]``. Batches for prediction are ``(images, names)`` with a list of B strings: paths, or names like "digit 123".

    Order and augmentation depend on the seed, the epoch and the image alone, not on workers, processes, batch size or
    an interruption. Every process sees equally many training images, and every evaluated image is seen exactly once.

    Args:
        img_size: Height and width in pixels; one number for a square.
        batch_size: Images per step and process.
        num_workers: Loading processes per training process; 0 loads in the training process, None chooses the number
            of cores per training process, at most 8.
        seed: Seed of order and augmentation; None takes that of ``seed_everything``, or 0.
        predict_path: An image file, or a folder searched recursively, to predict; None predicts the test part.
        on_bad_image: ``"error"`` stops at an image that cannot be read; ``"skip"`` replaces it by the next one in
            training, leaves it out elsewhere, and reports it.
        exif_orientation: ``"upright"`` turns photographs as their camera was held; ``"ignore"`` reads pixels as
            they are stored, as torchvision's loader does.

    Attributes:
        img_size: (height, width) in pixels.
        in_chans: Channels of the images, C.
        mean: Mean of every channel before normalisation, in units of full scale (0 to 1).
        std: Standard deviation of every channel, in the same units.
    """

    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        img_size: int | tuple[int, int],
        batch_size: int,
        num_workers: int | None = None,
        seed: int | None = None,
        predict_path: str | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
        exif_orientation: ExifOrientation = "upright",
    ) -> None:
        super().__init__()
        self.img_size = _checked_size(img_size)
        self.batch_size = _at_least("batch_size", batch_size, 1)
        self.num_workers = None if num_workers is None else _at_least("num_workers", num_workers, 0)
        self.seed = _checked_seed(seed)
        self.predict_path = predict_path
        self._bad_images = BadImagePolicy(on_bad_image)
        check_orientation(exif_orientation)
        self.exif_orientation = exif_orientation
        self._sources: dict[Part, ImageSource] = {}
        self._predict_source: ImageSource | None = None
        self._augmentation: Transform | None = None
        self._train_loader: TrainLoader | None = None
        self._order_before: dict[str, int] = {}

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """The name of every class, by label."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def skipped_images(self) -> list[str]:
        """Images that this process skipped so far because they could not be read."""
        return list(self._bad_images.reasons)

    @abstractmethod
    def load_part(self, part: Part) -> ImageSource:
        """Find the images of one part.

        Args:
            part: "train", "val" or "test".
        """

    def find_predicted(self, path: str) -> ImageSource:
        """The images that a user wants to predict.

        Args:
            path: An image file, or a folder that is searched recursively.
        """
        return ImageFiles(find_images(path), None, self.exif_orientation)

    @abstractmethod
    def train_transform(self) -> Transform:
        """Augmentation, from the decoded image to float32 ``[C, H, W]``."""

    @abstractmethod
    def eval_transform(self) -> Transform:
        """From the decoded image to float32 ``[C, H, W]``, without chance."""

    def setup(self, stage: str | None = None) -> None:
        """Find the images of the parts that a stage needs, unless they were found before.

        Args:
            stage: "fit", "validate", "test", "predict", or None for all.
        """
        if stage == "predict" and self.predict_path is not None:
            if self._predict_source is None:
                self._predict_source = self.find_predicted(self.predict_path)
            return
        for part in _PARTS[stage]:
            if part not in self._sources:
                self._sources[part] = self.load_part(part)
        if "train" in _PARTS[stage] and self._augmentation is None:
            self._augmentation = self.train_transform()  # A wrong argument is reported before the first epoch.

    def train_dataloader(self) -> TrainLoader:
        """Augmented images in random order; the last incomplete batch is left out if there is a complete one."""
        if self.trainer is not None:
            finish_loaded_epoch(self.trainer)
        self.setup("fit")
        self._check_labels("train")
        seed = self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
        augmentation = self._augmentation or self.train_transform()
        replace_bad = self._bad_images.action == "skip"
        dataset = ImageDataset(self._sources["train"], augmentation, seed, replace_bad=replace_bad)
        sampler = TrainSampler(dataset, seed)
        drop_last = len(sampler) >= self.batch_size
        options = {"order_before": self._order_before, "drop_last": drop_last, **self._loader_options()}
        self._train_loader = TrainLoader(dataset, sampler=sampler, **options)
        return self._train_loader

    def state_dict(self) -> dict[str, int]:
        """What decides which images are in a training batch. Lightning stores it in checkpoints."""
        return {} if self._train_loader is None else self._train_loader.order()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Remember what decided it in the training that is resumed.

        Args:
            state_dict: From `state_dict`.
        """
        self._order_before = dict(state_dict)

    def val_dataloader(self) -> ImageLoader:
        """The validation part, in order."""
        self.setup("validate")
        self._check_labels("val")
        return self._eval_loader(self._sources["val"])

    def test_dataloader(self) -> ImageLoader:
        """The test part, in order."""
        self.setup("test")
        self._check_labels("test")
        return self._eval_loader(self._sources["test"])

    def predict_dataloader(self) -> ImageLoader:
        """The images of ``predict_path``, or the test part, in order and with names instead of labels."""
        self.setup("predict")
        return self._eval_loader(self._predict_source or self._sources["test"], named=True)

    def whole_part(self, part: Part) -> ImageLoader:
        """All images of one part, in order and without augmentation, in this process, however many there are.

        Args:
            part: "train", "val" or "test".
        """
        self.setup({"train": "fit", "val": "validate", "test": "test"}[part])
        return self._eval_loader(self._sources[part], shared=False)

    def _check_labels(self, part: Part) -> None:
        """Refuse images that no class or no output of a classifier belongs to; in a loss they fail without a name."""
        labels, count = self._sources[part].labels, self.num_classes
        if without := int((labels < 0).sum()):
            raise QsdError(
                f"{without} of the {len(labels)} images of the {part} part have no class; leave them out, or use them "
                "for prediction alone."
            )
        if len(labels) and labels.max() >= count:
            raise QsdError(f"the {part} part has the label {labels.max()}, and the classes are 0 to {count - 1}.")

    def _eval_loader(self, source: ImageSource, named: bool = False, shared: bool = True) -> ImageLoader:
        dataset = ImageDataset(source, self.eval_transform(), named=named)
        sampler = EvalSampler(dataset) if shared else EvalSampler(dataset, num_replicas=1, rank=0)
        return ImageLoader(dataset, sampler=sampler, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        workers = self.num_workers
        if workers is None:
            processes = self.trainer.num_devices if self.trainer is not None else 1
            workers = min(8, _num_cores() // processes)
        return {
            "batch_size": self.batch_size,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "bad_images": self._bad_images,
        }


def data_modules() -> list[type[ImageData]]:
    """All data modules that are defined, for the messages of parsers."""
    found, left = [], [ImageData]
    while left:
        left += (known := left.pop()).__subclasses__()
        found.append(known)
    return found


def _num_cores() -> int:
    # The cores of this process, which a cluster's scheduler may have limited; macOS and Windows cannot tell.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _at_least(name: str, value: int, minimum: int) -> int:
    if value < minimum:
        raise QsdError(f"{name}={value} is too small; it must be at least {minimum}.")
    return value


def _checked_seed(seed: int | None) -> int | None:
    check_number("seed", seed, 0, LARGEST_SEED)
    return seed


def _checked_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if min(height, width) < 1:
        raise QsdError(f"img_size={img_size} is too small; height and width must be at least 1.")
    return height, width
