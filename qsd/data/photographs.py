"""The base of data modules for photographs: ImageNet's augmentation and preprocessing."""

from abc import ABC
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from qsd.data.base import ImageData
from qsd.data.dataset import Transform
from qsd.data.transforms import crop_transform, eval_transform
from qsd.errors import QsdError
from qsd.image_notes import Interpolation
from qsd.limits import check_number
from qsd.reading.images import ExifOrientation


class PhotographData(ImageData, ABC):
    """Photographs of any size and their classes.

    Args:
        img_size: Height and width in pixels; one number for a square.
        batch_size: Images per step and process.
        num_workers: Loading processes per training process; 0 loads in the training process, None chooses the number
            of cores per training process, at most 8.
        auto_augment: Policy of distortions, by its name in timm; ``None`` for no distortion.
        random_erasing: Probability that a rectangle is replaced by noise.
        color_jitter: Strength of brightness, contrast and saturation jitter; timm applies it only without
            ``auto_augment``.
        hflip: Probability of the horizontal flip.
        scale: Smallest and largest part of the image's area that a training crop covers.
        ratio: Smallest and largest aspect ratio of a training crop.
        interpolation: Interpolation of every resizing.
        crop_pct: The part of the resized image's side that evaluation keeps: 0.875 resizes to 256 and keeps 224.
        mean: Mean of the red, green and blue channel, in units of full scale (0 to 1).
        std: Standard deviation of these channels, in the same units.
        seed: Seed of order and augmentation; None takes that of ``seed_everything``, or 0.
        predict_path: An image file, or a folder searched recursively, to predict; None predicts the test part.
        on_bad_image: ``"error"`` stops at an image that cannot be read; ``"skip"`` replaces it by the next one in
            training, leaves it out elsewhere, and reports it.
        exif_orientation: ``"upright"`` turns photographs as their camera was held; ``"ignore"`` reads pixels as
            they are stored, as torchvision's loader does.
    """

    in_chans = 3

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        batch_size: int = 64,
        num_workers: int | None = None,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        random_erasing: float = 0.25,
        color_jitter: float = 0.4,
        hflip: float = 0.5,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: Interpolation = "bicubic",
        crop_pct: float = 0.875,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        seed: int | None = None,
        predict_path: str | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
        exif_orientation: ExifOrientation = "upright",
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, seed, predict_path, on_bad_image, exif_orientation)
        if min(std) <= 0:
            raise QsdError(f"std={tuple(std)} is not positive.")
        for name, values in (("mean", mean), ("std", std), ("scale", scale), ("ratio", ratio)):
            for value in values:
                check_number(name, value)
        check_number("color_jitter", color_jitter, 0)
        for name, (low, high) in (("scale", scale), ("ratio", ratio)):
            if not 0 < low <= high:
                raise QsdError(f"{name}=({low}, {high}) is not a range of positive numbers; give the smaller first.")
        self.mean, self.std = tuple(mean), tuple(std)
        self.interpolation = interpolation
        self.crop_pct = crop_pct
        self._augmentation_options: dict[str, Any] = {
            "auto_augment": auto_augment,
            "re_prob": random_erasing,
            "color_jitter": color_jitter,
            "hflip": hflip,
            "scale": tuple(scale),
            "ratio": tuple(ratio),
        }

    def train_transform(self) -> Transform:
        """See `ImageData`."""
        options = {**self._augmentation_options, "mean": self.mean, "std": self.std}
        return crop_transform(self.img_size, self.interpolation, **options)

    def eval_transform(self) -> Transform:
        """See `ImageData`."""
        return eval_transform(self.img_size, self.interpolation, self.crop_pct, mean=self.mean, std=self.std)
