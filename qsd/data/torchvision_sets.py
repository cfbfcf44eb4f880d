"""Data sets for classification that torchvision knows by name: MNIST and its kin, SVHN, CIFAR and STL-10."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torchvision import datasets, transforms

from qsd.data.base import ImageData, Part
from qsd.data.dataset import ImageArray, Transform
from qsd.data.transforms import crop_transform, eval_transform, padded_transform
from qsd.errors import QsdError
from qsd.limits import LARGEST_SEED, check_number
from qsd.reading import read_idx
from qsd.reading.images import ExifOrientation
from qsd.reading.splits import stratified_split

logger = logging.getLogger(__name__)

SetName = Literal["mnist", "fashion_mnist", "kmnist", "svhn", "cifar10", "cifar100", "stl10"]


@dataclass(frozen=True)
class _Set:
    """A data set.

    Attributes:
        cls: Class of torchvision.
        num_classes: Number of classes.
        size: Side of the images in pixels.
        mean: Mean by channel of the training images, in units of full scale.
        std: Standard deviation by channel.
        mirrored: Whether a mirrored image is of the same class.
        val_size: Number of training images that are reserved for validation.
    """

    cls: Any
    num_classes: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirrored: bool
    val_size: int = 5000

    @property
    def is_idx(self) -> bool:
        """Whether the images are in IDX files."""
        return issubclass(self.cls, datasets.MNIST)


_SETS: dict[str, _Set] = {
    "mnist": _Set(datasets.MNIST, 10, 28, (0.1307,), (0.3081,), False),
    "fashion_mnist": _Set(datasets.FashionMNIST, 10, 28, (0.2860,), (0.3530,), True),
    "kmnist": _Set(datasets.KMNIST, 10, 28, (0.1918,), (0.3483,), False),
    "svhn": _Set(datasets.SVHN, 10, 32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), False),
    "cifar10": _Set(datasets.CIFAR10, 10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True),
    "cifar100": _Set(datasets.CIFAR100, 100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), True),
    "stl10": _Set(datasets.STL10, 10, 96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), True, 500),
}


class TorchvisionData(ImageData):
    """MNIST, FashionMNIST, KMNIST, SVHN, CIFAR-10, CIFAR-100 or STL-10, from the files that torchvision uses.

    The validation part is a fixed piece of the training images, every class in proportion, so that the test images
    choose nothing. Published accuracies often are of a model trained on all training images and chosen on the test
    images: for that protocol, set ``val_size`` to 0.

    At the size of the data set, training images are shifted by up to an eighth of their side; at any other size (say,
    for an ImageNet model at 224) they are cropped and resized as on ImageNet.

    Args:
        root: Folder where torchvision keeps the files. The IDX files of MNIST, FashionMNIST and KMNIST may also lie in
            it directly, plain or gzipped, as the packages of Linux distributions install them.
        name: The data set.
        img_size: Height and width in pixels; one number for a square; None for the size of the data set.
        batch_size: Images per step and process.
        num_workers: Loading processes per training process; 0 loads in the training process, None chooses the number
            of cores per training process, at most 8.
        download: Fetch the files if they are missing.
        val_size: Number of training images that are reserved for validation; 0 trains on all and validates on the
            test images; None reserves 5,000, or 500 of the 5,000 training images of STL-10.
        split_seed: Which of the possible choices of validation images; another number gives another one.
        in_chans: 1 or 3 channels; None for those of the data set.
        auto_augment: Policy of distortions, by its name in timm; ``None`` for no distortion.
        random_erasing: Probability that a rectangle is replaced by noise.
        hflip: Probability of the horizontal flip; None flips half of the images, but no digits and characters, which
            would change their class.
        seed: Seed of order and augmentation, not of the split; None takes that of ``seed_everything``, or 0.
        predict_path: An image file, or a folder searched recursively, to predict; None predicts the test part.
        on_bad_image: ``"error"`` stops at an image of ``predict_path`` that cannot be read; ``"skip"`` leaves it out.
        exif_orientation: of the images of ``predict_path``: ``"upright"`` turns photographs as their camera was held;
            ``"ignore"`` reads pixels as they are stored.
    """

    crop_pct, interpolation = 1.0, "bicubic"

    def __init__(
        self,
        root: str,
        name: SetName,
        img_size: int | tuple[int, int] | None = None,
        batch_size: int = 128,
        num_workers: int | None = None,
        download: bool = False,
        val_size: int | None = None,
        split_seed: int = 0,
        in_chans: Literal[1, 3] | None = None,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        random_erasing: float = 0.25,
        hflip: float | None = None,
        seed: int | None = None,
        predict_path: str | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
        exif_orientation: ExifOrientation = "upright",
    ) -> None:
        if name not in _SETS:
            raise QsdError(f"name={name!r} is unknown; choose one of {', '.join(get_args(SetName))}.")
        self._set = _SETS[name]
        img_size = self._set.size if img_size is None else img_size
        super().__init__(img_size, batch_size, num_workers, seed, predict_path, on_bad_image, exif_orientation)
        if val_size is not None and val_size < 0:
            raise QsdError(f"val_size={val_size} is negative; 0 validates on the test images.")
        if in_chans not in (None, 1, 3):
            raise QsdError(f"in_chans={in_chans} is unknown; choose 1 (grey) or 3 (colours, or three equal channels).")
        check_number("split_seed", split_seed, 0, LARGEST_SEED)
        self.root = Path(root)
        self.name = name
        channels = len(self._set.mean)
        self.in_chans = channels if in_chans is None else in_chans
        self.mean, self.std = _channels(self._set.mean, self.in_chans), _channels(self._set.std, self.in_chans)
        self._download = download
        self._val_size = self._set.val_size if val_size is None else val_size
        self._split_seed = split_seed
        self._augmentation_options: dict[str, Any] = {
            "auto_augment": auto_augment,
            "re_prob": random_erasing,
            "hflip": (0.5 if self._set.mirrored else 0.0) if hflip is None else hflip,
            "color_jitter": None,  # Otherwise timm adds it where there is no policy.
        }
        self._class_names: list[str] | None = None

    @property
    def class_names(self) -> list[str]:
        """The name of every class, by label; of CIFAR and STL-10 read from the files."""
        if self._class_names is None:
            if self._set.is_idx:
                self._class_names = list(self._set.cls.classes)
            elif self.name == "svhn":
                self._class_names = [str(digit) for digit in range(10)]
            else:
                self._class_names = list(self._read_by_torchvision(train=False).classes)
        return self._class_names

    @property
    def num_classes(self) -> int:
        """The number of classes, without reading a file."""
        return self._set.num_classes

    def prepare_data(self) -> None:
        """Download, if asked to."""
        if not self._download or (self._set.is_idx and self._idx_file("train-images-idx3-ubyte") is not None):
            return
        source = getattr(self._set.cls, "url", None) or self._set.cls.__name__
        parts: list[dict[str, Any]] = [{"split": "train"}, {"split": "test"}] if self._has_splits else [{}]
        try:
            for part in parts:
                self._set.cls(str(self.root), download=True, **part)
        except (OSError, RuntimeError) as error:  # No network, a damaged archive.
            raise QsdError(
                f"cannot download {self.name} from {source} ({' '.join(str(error).split())}); fetch it another way and "
                f"extract it in {self.root}."
            ) from error

    def load_part(self, part: Part) -> ImageArray:
        """Read one part.

        Args:
            part: "train", "val" or "test".
        """
        from_test = part == "test" or (part == "val" and self._val_size == 0)
        images, labels = self._read(train=not from_test)
        indices = np.arange(len(labels))
        if not from_test and self._val_size > 0:
            if self._val_size >= len(labels):
                raise QsdError(f"val_size={self._val_size} leaves none of the {len(labels)} images for training.")
            sizes = (self._val_size, len(labels) - self._val_size)
            val, train = stratified_split(labels, sizes, self._split_seed)
            indices = val if part == "val" else train
        names = [f"{'test' if from_test else 'training'} image {index}" for index in indices]
        return ImageArray(images[indices], labels[indices], names)

    def train_transform(self) -> Transform:
        """See `ImageData`."""
        options = {**self._augmentation_options, "mean": self.mean, "std": self.std, "channels": self._given_channels}
        if self.img_size == (self._set.size, self._set.size):
            return padded_transform(self.img_size, "bicubic", padding=self._set.size // 8, **options)
        return crop_transform(self.img_size, "bicubic", **options)

    def eval_transform(self) -> Transform:
        """See `ImageData`."""
        resized = eval_transform(self.img_size, "bicubic", crop_pct=1.0, mean=self.mean, std=self.std)
        if self._given_channels is None:
            return resized
        return transforms.Compose([transforms.Grayscale(self._given_channels), resized])

    @property
    def _given_channels(self) -> int | None:
        """Equal channels that an image is given; none for colours."""
        return self.in_chans if self.in_chans == 1 or len(self._set.mean) == 1 else None

    @property
    def _has_splits(self) -> bool:
        return self.name in ("svhn", "stl10")

    def _read(self, train: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """All images ``[N, H, W]`` or ``[N, H, W, 3]`` and labels ``[N]`` of one of torchvision's two parts."""
        if self._set.is_idx:
            images, labels = self._read_idx("train" if train else "t10k")
        else:
            read = self._read_by_torchvision(train)
            images, labels = read.data, np.asarray(read.labels if self._has_splits else read.targets)
            if images.shape[1] == 3:  # SVHN and STL-10 are kept as [N, 3, H, W]
                images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
            self._class_names = list(getattr(read, "classes", None) or self.class_names)
        if not len(images) == len(labels) > 0 or not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise QsdError(f"{self.name} in {self.root} is damaged: its labels do not fit its images; fetch it again.")
        return images, labels

    def _read_idx(self, prefix: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        paths = [self._idx_file(name) for name in names]
        if paths[0] is None or paths[1] is None:
            missing = names[0] if paths[0] is None else names[1]
            raise QsdError(
                f"{self.name} is missing in {self.root}: no {missing} or {missing}.gz in it or in "
                f"{self.root / self._set.cls.__name__ / 'raw'}; bring the files there, or --data.download true."
            )
        return read_idx(paths[0], 3), read_idx(paths[1], 1).astype(np.int64)

    def _idx_file(self, name: str) -> Path | None:
        folders = (self.root, self.root / "raw", self.root / self._set.cls.__name__ / "raw")
        candidates = (folder / f"{name}{ending}" for folder in folders for ending in ("", ".gz"))
        return next((path for path in candidates if path.exists()), None)

    def _read_by_torchvision(self, train: bool) -> Any:
        dataset = self._set.cls
        base_folder = getattr(dataset, "base_folder", "")
        root = self.root.parent if base_folder and self.root.name == base_folder else self.root
        part: dict[str, Any] = {"split": "train" if train else "test"} if self._has_splits else {"train": train}
        try:
            return dataset(str(root), **part)
        except RuntimeError as error:  # torchvision does not tell a missing file from a damaged one.
            files = f"extract {dataset.filename}" if hasattr(dataset, "filename") else "bring its .mat files"
            raise QsdError(
                f"{self.name} is missing or damaged in {root / base_folder}; {files} in {root}, or "
                "--data.download true."
            ) from error


class CifarData(TorchvisionData):
    """The former name of `TorchvisionData`, for configurations that name it.

    Args:
        root: Folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        name: The data set.
        img_size: Height and width in pixels; one number for a square.
        **options: As for `TorchvisionData`.
    """

    def __init__(
        self,
        root: str,
        name: Literal["cifar10", "cifar100"] = "cifar10",
        img_size: int | tuple[int, int] = 32,
        **options: Any,
    ) -> None:
        super().__init__(root, name, img_size, **options)
        logger.warning("qsd.data.CifarData is now called qsd.data.TorchvisionData; please write that name.")


def _channels(values: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Means or deviations for another number of channels."""
    if len(values) == count:
        return values
    return values * count if len(values) == 1 else (sum(values) / len(values),)
