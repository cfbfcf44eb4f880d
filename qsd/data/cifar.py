"""CIFAR-10 and CIFAR-100."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from qsd.data.base import ImageData, Part
from qsd.data.dataset import ImageArray, Transform
from qsd.data.sampling import stratified_split
from qsd.data.transforms import crop_transform, eval_transform, padded_transform
from qsd.errors import QsdError
from qsd.reading.images import ExifOrientation

_CLASSES = {"cifar10": CIFAR10, "cifar100": CIFAR100}
_NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
_MEAN = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4865, 0.4409)}
_STD = {"cifar10": (0.2470, 0.2435, 0.2616), "cifar100": (0.2673, 0.2564, 0.2762)}


class CifarData(ImageData):
    """CIFAR-10 or CIFAR-100, 32x32 pixels, from the files that torchvision uses.

    The validation part is a fixed piece of the 50,000 training images, every class in proportion, so that the test
    images choose nothing. The published accuracies are of a model trained on all 50,000 and chosen on the test images:
    for that protocol, set ``val_size`` to 0.

    At 32 pixels, training images are shifted by up to 4 pixels; at any other size (say, for an ImageNet model at 224)
    they are cropped and resized as on ImageNet.

    Args:
        root: Folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        name: The data set.
        img_size: Height and width in pixels; one number for a square.
        batch_size: Images per step and process.
        num_workers: Loading processes per training process; 0 loads in the training process, None chooses the number
            of cores per training process, at most 8.
        download: Fetch the files if they are missing.
        val_size: Number of training images that are reserved for validation; 0 trains on all and validates on the
            test images.
        auto_augment: Policy of distortions, by its name in timm; ``None`` for no distortion.
        random_erasing: Probability that a rectangle is replaced by noise.
        hflip: Probability of the horizontal flip.
        seed: Seed of order and augmentation, not of the split; None takes that of ``seed_everything``, or 0.
        predict_path: An image file, or a folder searched recursively, to predict; None predicts the test part.
        on_bad_image: ``"error"`` stops at an image of ``predict_path`` that cannot be read; ``"skip"`` leaves it out.
        exif_orientation: of the images of ``predict_path``: ``"upright"`` turns photographs as their camera was held;
            ``"ignore"`` reads pixels as they are stored.
    """

    in_chans = 3

    def __init__(
        self,
        root: str,
        name: Literal["cifar10", "cifar100"] = "cifar10",
        img_size: int | tuple[int, int] = 32,
        batch_size: int = 128,
        num_workers: int | None = None,
        download: bool = False,
        val_size: int = 5000,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        random_erasing: float = 0.25,
        hflip: float = 0.5,
        seed: int | None = None,
        predict_path: str | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
        exif_orientation: ExifOrientation = "upright",
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, seed, predict_path, on_bad_image, exif_orientation)
        if name not in _CLASSES:
            raise QsdError(f"name={name!r} is unknown; choose 'cifar10' or 'cifar100'.")
        if val_size < 0:
            raise QsdError(f"val_size={val_size} is negative; 0 validates on the test images.")
        self.root = Path(root)
        self._name = name
        self.mean, self.std = _MEAN[name], _STD[name]
        self._download = download
        self._val_size = val_size
        self._augmentation_options: dict[str, Any] = {
            "auto_augment": auto_augment,
            "re_prob": random_erasing,
            "hflip": hflip,
            "color_jitter": None,  # Otherwise timm adds it where there is no policy.
        }
        self._class_names: list[str] | None = None

    @property
    def class_names(self) -> list[str]:
        """The name of every class, by label; read from the files."""
        return self._class_names or list(self._read(train=False).classes)

    @property
    def num_classes(self) -> int:
        """10 or 100, without reading a file."""
        return _NUM_CLASSES[self._name]

    def prepare_data(self) -> None:
        """Download, if asked to."""
        if not self._download:
            return
        dataset = _CLASSES[self._name]
        try:
            dataset(str(self.root), download=True)
        except (OSError, RuntimeError) as error:  # No network, a damaged archive.
            raise QsdError(
                f"cannot download {self._name} from {dataset.url} ({error}); fetch it another way and extract it in"
                f" {self.root}."
            ) from error

    def load_part(self, part: Part) -> ImageArray:
        """Read one part.

        Args:
            part: "train", "val" or "test".
        """
        from_test = part == "test" or (part == "val" and self._val_size == 0)
        dataset = self._read(train=not from_test)
        labels = np.asarray(dataset.targets)
        indices = np.arange(len(labels))
        if not from_test and self._val_size > 0:
            if self._val_size >= len(labels):
                raise QsdError(f"val_size={self._val_size} leaves none of the {len(labels)} images for training.")
            val, train = stratified_split(labels, (self._val_size, len(labels) - self._val_size))
            indices = val if part == "val" else train
        names = [f"{'test' if from_test else 'training'} image {index}" for index in indices]
        return ImageArray(dataset.data[indices], labels[indices], names)

    def train_transform(self) -> Transform:
        """See `ImageData`."""
        options = {**self._augmentation_options, "mean": self.mean, "std": self.std}
        if self.img_size == (32, 32):
            return padded_transform(self.img_size, "bicubic", padding=4, **options)
        return crop_transform(self.img_size, "bicubic", **options)

    def eval_transform(self) -> Transform:
        """See `ImageData`."""
        return eval_transform(self.img_size, "bicubic", crop_pct=1.0, mean=self.mean, std=self.std)

    def _read(self, train: bool) -> Any:
        dataset = _CLASSES[self._name]
        try:
            read = dataset(str(self.root), train=train)
        except RuntimeError as error:  # torchvision does not tell a missing file from a damaged one.
            raise QsdError(
                f"{self._name} is missing or damaged in {self.root / dataset.base_folder}; extract"
                f" {dataset.filename} in {self.root}, or --data.download true."
            ) from error
        self._class_names = list(read.classes)
        return read
