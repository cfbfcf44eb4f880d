"""Image folders in ImageNet's layout."""

from pathlib import Path
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from qsd.data.base import ImageData, Part
from qsd.data.dataset import ImageFiles, Transform
from qsd.data.files import ImageFinder, class_folders
from qsd.data.transforms import crop_transform, eval_transform
from qsd.errors import QsdError
from qsd.image_notes import Interpolation
from qsd.reading.files import shown
from qsd.reading.images import ExifOrientation

_FOLDERS: dict[Part, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}


class ImageFolderData(ImageData):
    """``root/train/<class>/*`` and ``root/val/<class>/*`` (or ``validation``), and perhaps ``root/test/<class>/*``.

    Images are searched recursively in each class folder; hidden files are ignored. The labels number the sorted class
    folders of the training part; without one (evaluation only) those of the others, which then must hold all classes
    for the labels to be right. Without a test folder the validation part is the test part.

    Args:
        root: Folder that holds ``train`` and ``val``.
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
        root: str,
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
        for name, (low, high) in (("scale", scale), ("ratio", ratio)):
            if not 0 < low <= high:
                raise QsdError(f"{name}=({low}, {high}) is not a range of positive numbers; give the smaller first.")
        self.root = Path(root)
        self.mean, self.std = tuple(mean), tuple(std)
        self._class_names: list[str] | None = None
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

    @property
    def class_names(self) -> list[str]:
        """The name of every class folder, by label."""
        if self._class_names is None:
            self._class_names = self._find_classes()
        return self._class_names

    def load_part(self, part: Part) -> ImageFiles:
        """List the files of one part.

        Args:
            part: "train", "val" or "test".
        """
        label = {name: index for index, name in enumerate(self.class_names)}
        folder = self._folder(part) or (self._folder("val") if part == "test" else None)
        if folder is None:
            raise QsdError(f"{self.root} has no folder {part}; expected {part}/<class>/<image> in it.")
        found = class_folders(folder)
        if not found:
            raise QsdError(f"{folder} has no class folders; expected {folder}/<class>/<image>.")
        if unknown := [name for name in found if name not in label]:
            raise QsdError(
                f"{folder} has {_listed(unknown, 'class folder')} missing in {self.root / 'train'}; remove or rename."
            )
        paths: list[str] = []
        labels: list[int] = []
        empty: list[str] = []
        finder = ImageFinder()
        for name in found:
            images = finder.find(folder / name)
            paths += images
            labels += [label[name]] * len(images)
            if not images:
                empty.append(name)
        if empty:
            finder.report(folder)  # which may tell why
            raise QsdError(
                f"{folder} has {_listed(empty, 'class folder')} without images; add some or remove the folder."
            )
        finder.report(folder)
        return ImageFiles(paths, labels, self.exif_orientation)

    def train_transform(self) -> Transform:
        """See `ImageData`."""
        options = {**self._augmentation_options, "mean": self.mean, "std": self.std}
        return crop_transform(self.img_size, self.interpolation, **options)

    def eval_transform(self) -> Transform:
        """See `ImageData`."""
        return eval_transform(self.img_size, self.interpolation, self.crop_pct, mean=self.mean, std=self.std)

    def _folder(self, part: Part) -> Path | None:
        return next((self.root / name for name in _FOLDERS[part] if (self.root / name).is_dir()), None)

    def _find_classes(self) -> list[str]:
        if not self.root.is_dir():
            raise QsdError(f"root {self.root} is not a folder; give the one that holds train/<class> and val/<class>.")
        train = self._folder("train")
        folders = [train] if train else [folder for part in ("val", "test") if (folder := self._folder(part))]
        if not folders:
            found = sorted(entry.name for entry in self.root.iterdir())
            holds = f"it holds {_listed(found, 'entry', 'entries')}" if found else "it is empty"
            raise QsdError(
                f"root {self.root} has no train or val; expected train/<class>/<image> and val/<class>/<image>, "
                f"{holds}."
            )
        return sorted({name for folder in folders for name in class_folders(folder)})


def _listed(names: list[str], singular: str, plural: str | None = None) -> str:
    """Number, noun and first names, such as "2 class folders (cat, dog)"."""
    noun = singular if len(names) == 1 else plural or singular + "s"
    return f"{len(names)} {noun} ({', '.join(map(shown, names[:5]))}{', ...' if len(names) > 5 else ''})"
