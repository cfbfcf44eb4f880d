"""Image data sets by the names of timm's readers: ``hfds/`` (Hugging Face), ``wds/`` (WebDataset), ``tar/``."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from qsd.data.base import Part
from qsd.data.dataset import ImageSource, ImageSubset
from qsd.data.hub import HubImages, has_split, hub_splits, load_split
from qsd.data.photographs import PhotographData
from qsd.data.shard_files import find_compressed, find_shards, listed_images
from qsd.data.shards import Index, ShardImages, index_shard
from qsd.errors import QsdError
from qsd.limits import check_number
from qsd.reading import regular_file, shown
from qsd.reading.splits import stratified_split

logger = logging.getLogger(__name__)

_VALIDATION = ("validation", "val", "valid")
_READERS = ("hfds", "wds", "tar")


class ReaderData(PhotographData):
    """Images in parquet files, in a data set saved to disk, in WebDataset's shards, or in tar files.

    Whatever the format, every image is read alone: order, resuming and the shares of processes and workers are those
    of `qsd.data.ImageData`. Shards are indexed once. Nothing in them is unpickled, run or fetched.

    Args:
        name: ``"hfds/OWNER/NAME"`` for a data set of the Hugging Face hub, ``"hfds/"`` for a folder of parquet files
            or one that ``save_to_disk`` wrote, ``"wds/"`` for a folder of WebDataset's shards, ``"tar/"`` for a folder
            of archives that hold a folder of images for each class.
        root: The folder. For a data set of the hub, the folder of its cache; ``None`` for the usual one.
        img_size: Height and width in pixels; one number for a square.
        batch_size: Images per step and process.
        num_workers: Loading processes per training process; 0 loads in the training process, None chooses the number
            of cores per training process, at most 8.
        train_split: Name of the training split; for shards also their names, as in ``"train-{0000..0127}.tar"``.
        val_split: The same for validation; ``None`` for "validation", "val" or "valid".
        test_split: The same for the test; ``None`` takes the validation images.
        val_size: Number of training images that are reserved for validation; 0 reads the validation split.
        image_key: Column of the images (``hfds/``).
        label_key: Column of the classes, "label" by default (``hfds/``), or field of the ``.json`` beside an image;
            ``None`` reads the ``.cls`` (``wds/``).
        class_names: Text file with the name of a class in each line, by label. For ``tar/`` these are the names of the
            folders, whose order it decides; without it they are sorted.
        download: Whether a data set may be fetched from the hub.
        **options: Augmentation, preprocessing and seed, as for `PhotographData`.
    """

    def __init__(
        self,
        name: str,
        root: str | None = None,
        img_size: int | tuple[int, int] = 224,
        batch_size: int = 64,
        num_workers: int | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_size: int = 0,
        image_key: str = "image",
        label_key: str | None = None,
        class_names: str | None = None,
        download: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, **options)
        self.reader, slash, self._name = name.partition("/")
        if self.reader not in _READERS or not slash:
            raise QsdError(f"name={name!r} names no reader; it begins with {', '.join(f'{r}/' for r in _READERS)}.")
        if self._name and self.reader != "hfds":
            raise QsdError(f"name={name!r} is no reader; write {self.reader}/ and the folder as --data.root.")
        if root is None and not (self.reader == "hfds" and self._name):
            raise QsdError(f"name={name!r} needs --data.root, the folder of the data set.")
        check_number("val_size", val_size, 0)
        self.name, self.root = name, None if root is None else Path(root)
        self._splits: dict[Part, str | None] = {"train": train_split, "val": val_split, "test": test_split}
        self._val_size = val_size
        self._image_key, self._label_key = image_key, label_key
        self._class_file = class_names
        self._download = download
        self._class_names: list[str] | None = None
        self._found_texts = False  # whether the labels of the training split are texts, which we number
        self._found_names: list[str] | None = None  # as the training split has them, not as `class_names` lists them
        self._read: dict[str, ImageSource] = {}
        self._shards: dict[str, list[Path]] = {}

    @property
    def class_names(self) -> list[str]:
        """The name of every class, by label; those of the training split."""
        if self._class_names is None:
            try:
                self._read_split(self._split("train"))
            except QsdError:
                if self._exists(self._split("train")):
                    raise
                self._read_split(self._split("val"))  # evaluation without a training part
        assert self._class_names is not None
        return self._class_names

    def prepare_data(self) -> None:
        """Fetch what is missing, if asked to, and index shards, in one process for all."""
        for part in ("train", "val"):
            try:
                self._read_split(self._split(part))
            except QsdError:
                continue  # the stage that needs this part tells why it cannot be read

    def load_part(self, part: Part) -> ImageSource:
        """Find the images of one part.

        Args:
            part: "train", "val" or "test".
        """
        if part == "test" and self._splits["test"] is None:
            return self.load_part("val")
        if part == "test" or (part == "val" and not self._val_size):
            names = self.class_names
            source = self._read_split(self._split(part))
            if len(source.labels) and source.labels.max() >= len(names):
                raise QsdError(
                    f"the split {self._split(part)} has the label {source.labels.max()}, and {len(names)} classes are "
                    "known from the training split; name them with --data.class_names."
                )
            self._check_overlap(self._split(part))
            return source
        source = self._read_split(self._split("train"))
        if not self._val_size:
            return source
        if self._val_size >= len(source):
            raise QsdError(f"val_size={self._val_size} leaves none of the {len(source)} images for training.")
        val, train = stratified_split(source.labels, (self._val_size, len(source) - self._val_size))
        return ImageSubset(source, val if part == "val" else train)

    def _split(self, part: Part) -> str:
        """The name of a part's split."""
        given = self._splits[part]
        if given is not None:
            return given
        candidates = _VALIDATION if part == "val" else ("test",)
        if self.reader == "hfds" and self._name:
            known = hub_splits(self._name, self.root, self._download)
            found = next((name for name in candidates if name in known), None)
        else:
            self._check_root()
            found = next((name for name in candidates if self._exists(name)), None)
        if found is None:
            raise QsdError(
                f"{self._name or self.root} has no split {' or '.join(candidates)}; name it with --data.{part}_split, "
                "or reserve training images with --data.val_size."
            )
        return found

    def _exists(self, split: str) -> bool:
        """Whether the folder holds a split; the hub is not asked."""
        if self.root is None or self._name:
            return False
        return has_split(self.root, split) if self.reader == "hfds" else bool(find_shards(self.root, split))

    def _check_overlap(self, split: str) -> None:
        """Refuse to evaluate on files of the training split, unless the user names that split itself."""
        train = self._split("train")
        shared = set(self._shards.get(train, ())) & set(self._shards.get(split, ()))
        if shared and split != train:
            raise QsdError(
                f"the splits {train} and {split} share the file {shown(min(shared))}; name the files of each with "
                "--data.train_split and --data.val_split, as in train-{0000..0127}.tar."
            )

    def _check_root(self) -> None:
        if not self._name and not (self.root is not None and self.root.is_dir()):
            raise QsdError(f"root {shown(self.root)} is not a folder; give the one that holds the data set.")

    def _read_split(self, split: str) -> ImageSource:
        if split not in self._read:
            self._check_root()
            self._read[split] = self._read_hub(split) if self.reader == "hfds" else self._read_shards(split)
        return self._read[split]

    def _read_hub(self, split: str) -> HubImages:
        dataset = load_split(self._name, self.root, split, self._download)
        keys = (self._image_key, self._label_key or "label")
        images = HubImages(dataset, *keys, split, self.exif_orientation, self._found_names)
        if self._found_texts and images.numbers:
            raise QsdError(
                f"the labels of the split {split} are numbers without names, and those of the training split texts; "
                "write texts in both."
            )
        if self._class_names is None:
            self._found_texts, self._found_names = images.texts, images.class_names
            self._class_names = self._listed_names(len(images.class_names)) or images.class_names
        return images

    def _read_shards(self, split: str) -> ImageSource:
        paths, indices = self._indices(split)
        classes = np.concatenate([index.classes for index in indices])
        if self.reader == "wds":
            labels = classes.astype(np.int64)
        else:
            if self._class_names is None:
                self._class_names = self._listed_names(0) or [os.fsdecode(name) for name in np.unique(classes)]
            labels = self._numbered(classes, split)
        if not len(labels) or labels.max() < 0:
            raise QsdError(f"the tar files of the split {split} in {shown(self.root)} hold no image with a class.")
        if self._class_names is None:
            count = int(labels.max()) + 1
            self._class_names = self._listed_names(count) or [str(number) for number in range(count)]
        images = ShardImages(paths, indices, labels, self.exif_orientation)
        if (without := int((labels < 0).sum())) == 0:
            return images
        logger.warning("%d of %d images of the split %s have no class and are left out.", without, len(labels), split)
        return ImageSubset(images, np.flatnonzero(labels >= 0))

    def _numbered(self, classes: np.ndarray[Any, Any], split: str) -> np.ndarray[Any, Any]:
        label = {name: number for number, name in enumerate(self._class_names or ())}
        texts, inverse = np.unique(classes, return_inverse=True)
        names = [os.fsdecode(text) for text in texts]
        if unknown := [name for name in names if name not in label]:
            known = "the training split" if self._class_file is None else shown(self._class_file)
            raise QsdError(f"the split {split} has the class {shown(unknown[0])}, which {known} lacks.")
        return np.array([label[name] for name in names], np.int64)[inverse]

    def _indices(self, split: str) -> tuple[list[Path], list[Index]]:
        assert self.root is not None
        paths = find_shards(self.root, split)
        if not paths:
            if (compressed := find_compressed(self.root, split)) is not None:
                raise QsdError(
                    f"{shown(compressed)} is compressed, and images in it cannot be read one by one; unpack it to a "
                    ".tar, as gunzip does."
                )
            raise QsdError(f"{shown(self.root)} has no tar files of the split {split}; name them with --data.*_split.")
        key = self._label_key if self.reader == "wds" else None
        read = track(paths, f"tar files of the split {split}", transient=True)
        indices = [index_shard(path, key, in_folders=self.reader == "tar") for path in read]
        listed, found = listed_images(self.root, split), sum(len(index.offsets) for index in indices)
        if listed is not None and listed != found:
            logger.warning("the list of the split %s has %d images, and its tar files hold %d.", split, listed, found)
        self._shards[split] = paths
        return paths, indices

    def _listed_names(self, count: int) -> list[str] | None:
        if self._class_file is None:
            return None
        path = regular_file(self._class_file, "list of classes")
        try:
            names = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise QsdError(f"{shown(path)} is no text in UTF-8; save it as such.") from error
        if len(names) < count:
            raise QsdError(f"{shown(path)} has {len(names)} lines, and the data set has {count} classes.")
        return names
