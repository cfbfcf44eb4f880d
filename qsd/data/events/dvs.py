"""Published data sets of event cameras, from their files."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from qsd.data.base import Part
from qsd.data.events.base import EventData
from qsd.data.events.frames import FrameAugmentation
from qsd.data.events.recordings import RecordingFiles
from qsd.data.files import ImageFinder, class_folders
from qsd.errors import QsdError
from qsd.reading.events import EventFormat
from qsd.reading.splits import stratified_split

logger = logging.getLogger(__name__)

DvsName = Literal["cifar10_dvs", "dvs128_gesture", "n_mnist", "n_caltech101"]
_GESTURES = (
    "hand clapping", "right hand wave", "left hand wave", "right arm clockwise", "right arm counter-clockwise",
    "left arm clockwise", "left arm counter-clockwise", "arm roll", "air drums", "air guitar", "other gestures",
)  # fmt: skip


@dataclass(frozen=True)
class _Layout:
    """Files of a data set.

    Attributes:
        sensor: Height and width of the sensor; ``None`` where recordings differ.
        img_size: Height and width of the frames by default.
        train: Folder of the training part, or of all recordings.
        test: Folder of the test part; ``None`` where the data set has no test part.
        endings: Endings of the recordings.
        names: Names of the classes; ``None`` for those of the folders.
        layout: Layout of the files.
        tonic: tonic's class that downloads the data set.
    """

    sensor: tuple[int, int] | None
    img_size: int
    train: str
    test: str | None
    endings: tuple[str, ...]
    names: tuple[str, ...] | None
    layout: EventFormat
    tonic: str


_LAYOUTS: dict[str, _Layout] = {
    "cifar10_dvs": _Layout((128, 128), 64, "", None, (".aedat4", ".aedat"), None, "dvs128", "CIFAR10DVS"),
    "dvs128_gesture": _Layout(
        (128, 128), 64, "ibmGestureTrain", "ibmGestureTest", (".npy",), _GESTURES, "gesture", "DVSGesture"
    ),
    "n_mnist": _Layout((34, 34), 34, "Train", "Test", (".bin",), None, "auto", "NMNIST"),
    "n_caltech101": _Layout(None, 64, "Caltech101", None, (".bin",), None, "auto", "NCALTECH101"),
}


class DvsData(EventData):
    """CIFAR10-DVS, DVS128 Gesture, N-MNIST or N-Caltech101.

    The files are those that tonic downloads and unpacks, in a folder of the data set: ``root/airplane/*.aedat4`` (or
    the ``.aedat`` files of the first publication), ``root/ibmGestureTrain/user01_fluorescent/0.npy`` (gestures cut out
    by tonic, with times in milliseconds), ``root/Train/0/00002.bin`` and ``root/Caltech101/accordion/image_0001.bin``.
    They are read by tonic and aedat, which ``pip install 'qsd[events]'`` installs.

    Where a data set has no test part, a tenth of each class is the test part. The validation part is a fixed piece of
    the training part, every class in proportion, so that the test part chooses nothing. The published accuracies choose
    on the test part: for that protocol, set ``val_share`` to 0.

    Args:
        root: Folder of the data set.
        name: The data set.
        frames: Number F of frames.
        img_size: Height and width of the frames in pixels; ``None`` for 34 (N-MNIST) or 64.
        batch_size: Recordings per step and process.
        num_workers: Loading processes per training process; 0 loads in the training process, None chooses the number
            of cores per training process, at most 8.
        bin_ms: Length of a bin in milliseconds, from the first event on; ``None`` divides each recording into equal
            parts.
        download: Fetch the files by tonic if they are missing.
        val_share: Share of the training recordings that is reserved for validation; 0 trains on all and validates on
            the test part.
        denoise_ms: Events without another one beside them within so many milliseconds are left out; ``None`` for none.
        cache: Folder that keeps the frames of recordings; ``None`` reads their events every time.
        degrees: Greatest angle by which training recordings are turned.
        shift: Greatest shift of training recordings, as share of the side.
        hflip: Probability of the horizontal flip in training.
        drop: Greatest share of events that are dropped in training.
        seed: Seed of order and augmentation, not of the split; None takes that of ``seed_everything``, or 0.
        predict_path: A recording, or a folder searched recursively, to predict; None predicts the test part.
        on_bad_image: ``"error"`` stops at a recording that cannot be read; ``"skip"`` replaces it by the next one in
            training, leaves it out elsewhere, and reports it.
    """

    def __init__(
        self,
        root: str,
        name: DvsName = "cifar10_dvs",
        frames: int = 8,
        img_size: int | tuple[int, int] | None = None,
        batch_size: int = 16,
        num_workers: int | None = None,
        bin_ms: float | None = None,
        download: bool = False,
        val_share: float = 0.1,
        denoise_ms: float | None = None,
        cache: str | None = None,
        degrees: float = 0.0,
        shift: float = 0.1,
        hflip: float = 0.0,
        drop: float = 0.1,
        seed: int | None = None,
        predict_path: str | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
    ) -> None:
        if name not in _LAYOUTS:
            raise QsdError(f"name={name!r} is unknown; choose one of {', '.join(get_args(DvsName))}.")
        if not 0 <= val_share < 1:
            raise QsdError(f"val_share={val_share} is no share below 1.")
        self._set, self.root, self._name = _LAYOUTS[name], Path(root), name
        self.sensor = self._set.sensor
        super().__init__(
            frames, img_size or self._set.img_size, batch_size, num_workers,
            FrameAugmentation(degrees, shift, 0.0, hflip, drop), bin_ms, seed, predict_path, on_bad_image,
            self._set.layout, "us", denoise_ms, cache,
        )  # fmt: skip
        self._download, self._val_share = download, val_share
        self._found: dict[str, tuple[list[str], np.ndarray[Any, Any]]] = {}
        self._class_names = list(self._set.names or ())

    @property
    def class_names(self) -> list[str]:
        """The name of every class, by label; those of the folders of the training part."""
        if not self._class_names:
            folder = self.root / self._set.train
            self._class_names = class_folders(folder) if folder.is_dir() else []
            if not self._class_names:
                raise self._missing(folder)
        return self._class_names

    def prepare_data(self) -> None:
        """Download by tonic, if asked to."""
        if not self._download or (self.root / self._set.train).is_dir():
            return
        try:
            from tonic import datasets
        except ImportError as error:
            raise QsdError("downloading recordings needs tonic: pip install 'qsd[events]'.") from error
        kind = getattr(datasets, self._set.tonic)
        try:
            # tonic makes a folder of the class's name.
            arguments: list[dict[str, bool]] = [{}] if self._set.test is None else [{"train": True}, {"train": False}]
            for options in arguments:
                kind(str(self.root.parent), **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise QsdError(
                f"cannot download {self._name} ({error}); fetch it another way and unpack it in {self.root}."
            ) from error
        if not (self.root / self._set.train).is_dir():
            raise QsdError(
                f"tonic has unpacked {self._name} in {self.root.parent / self._set.tonic}; give it as --data.root."
            )

    def load_part(self, part: Part) -> RecordingFiles:
        """List the recordings of one part.

        Args:
            part: "train", "val" or "test".
        """
        training, test = self._split_test()
        paths, labels = training
        if part == "test" or not self._val_share:
            paths, labels = test if part != "train" else training
        else:
            count = round(self._val_share * len(labels))
            if not 0 < count < len(labels):
                raise QsdError(
                    f"val_share={self._val_share} leaves none of {len(labels)} recordings for training or validation."
                )
            val, train = stratified_split(labels, (count, len(labels) - count))
            chosen = val if part == "val" else train
            paths, labels = [paths[index] for index in chosen], labels[chosen]
        return self.files(paths, labels.tolist())

    def _split_test(self) -> Any:
        """Paths and labels of the recordings for training and validation, and of those for the test."""
        paths, labels = self._list(self._set.train)
        if self._set.test is not None:
            return (paths, labels), self._list(self._set.test)
        count = max(1, len(labels) // 10)
        if count >= len(labels):
            raise QsdError(f"{self.root} holds {len(labels)} recordings, which cannot be divided into parts.")
        test, train = stratified_split(labels, (count, len(labels) - count))
        return tuple(([paths[index] for index in part], labels[part]) for part in (train, test))

    def _list(self, name: str) -> tuple[list[str], np.ndarray[Any, Any]]:
        """All recordings of a folder and their labels, in a fixed order."""
        if name not in self._found:
            folder = self.root / name
            if not folder.is_dir():
                raise self._missing(folder)
            finder = ImageFinder(self._set.endings)
            paths = finder.find(folder)
            finder.report(folder)
            labels = [self._label(path, folder) for path in paths]
            if not paths:
                raise self._missing(folder)
            self._found[name] = paths, np.asarray(labels, dtype=np.int64)
        return self._found[name]

    def _label(self, path: str, folder: Path) -> int:
        """The class of a recording: the number that a gesture's file is called by, or the folder's."""
        if self._set.names is not None:
            number = Path(path).stem
            if number.isdecimal() and int(number) < len(self._set.names):
                return int(number)
            raise QsdError(f"{path} is not called by the number of a gesture, 0 to {len(self._set.names) - 1}.")
        first = os.path.relpath(path, folder).split(os.sep)[0]
        if first not in self.class_names:
            raise QsdError(f"{path} lies in no folder of a class; classes are {', '.join(self.class_names[:3])}, ...")
        return self.class_names.index(first)

    def _missing(self, folder: Path) -> QsdError:
        endings = " or ".join(self._set.endings)
        return QsdError(
            f"{self._name} is missing: {folder} holds no recordings ({endings}); unpack it there, or --data.download "
            "true."
        )
