"""Base of the data modules of event cameras."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal

from torchvision.transforms import Compose

from qsd.data.base import ImageData, Part
from qsd.data.dataset import ImageSource, Transform
from qsd.data.events.frames import Binning, FrameAugmentation, to_tensor
from qsd.data.events.recordings import RecordingFiles
from qsd.data.files import ImageFinder
from qsd.errors import QsdError
from qsd.limits import check_number
from qsd.reading.events import EventFormat, check_layout, event_endings
from qsd.reading.files import regular_file, shown


class EventData(ImageData):
    """Recordings of event cameras and their classes, for one classifier.

    Batches are those of `ImageData`, with frames ``[B, F, 2, H, W]`` in place of images: float32, the numbers of events
    by bin of time, of darker pixels in channel 0 and of brighter ones in channel 1. They are not normalised: a network
    that is built with ``events=True`` takes them for spikes, of which it passes on T at most.

    Args:
        frames: Number F of frames.
        img_size: Height and width of the frames in pixels; one number for a square.
        batch_size: Recordings per step and process.
        num_workers: As in `ImageData`.
        augmentation: Chance in training, the same for all frames of a recording.
        bin_ms: Length of a bin in milliseconds, see `Binning`; ``None`` for equal parts of each recording.
        seed: Seed of order and augmentation; None takes that of ``seed_everything``, or 0.
        predict_path: A recording, or a folder searched recursively, to predict; None predicts the test part.
        on_bad_image: As in `ImageData`, for recordings.
        layout: Layout of files whose ending does not tell it.
        time_unit: Unit of the times in structured arrays: ``"us"``, ``"ms"``, ``"s"`` or ``"ns"``.
        denoise_ms: Events without another one beside them within so many milliseconds are left out; ``None`` for none.
        cache: Folder that keeps the frames of recordings; ``None`` reads their events every time.

    Attributes:
        sensor: Height and width of the sensor; ``None`` takes those of each recording.
    """

    in_chans = 2
    mean, std = (0.0, 0.0), (1.0, 1.0)
    sensor: tuple[int, int] | None = None

    def __init__(
        self,
        frames: int,
        img_size: int | tuple[int, int],
        batch_size: int,
        num_workers: int | None = None,
        augmentation: FrameAugmentation | None = None,
        bin_ms: float | None = None,
        seed: int | None = None,
        predict_path: str | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
        layout: EventFormat = "auto",
        time_unit: str = "us",
        denoise_ms: float | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, seed, predict_path, on_bad_image)
        check_layout(layout, time_unit)
        check_number("denoise_ms", denoise_ms, 1e-3)
        self.frames, self.bin_ms = frames, bin_ms
        self.layout, self.time_unit, self.denoise_ms, self.cache = layout, time_unit, denoise_ms, cache
        self.augmentation = augmentation or FrameAugmentation()
        self.binning()  # Wrong numbers are reported before any file is read.

    @abstractmethod
    def load_part(self, part: Part) -> ImageSource:
        """Find the recordings of one part.

        Args:
            part: "train", "val" or "test".
        """

    def binning(self) -> Binning:
        """How events become frames."""
        return Binning(self.frames, self.img_size, self.sensor, self.bin_ms)

    def files(self, paths: list[str], labels: list[int] | None) -> RecordingFiles:
        """A source of recordings on disk, with the settings of this module.

        Args:
            paths: The files.
            labels: Their classes; ``None`` if they are unknown.
        """
        how = (self.layout, self.time_unit, self.denoise_ms, self.cache)
        return RecordingFiles(paths, labels, self.binning(), *how)

    def find_predicted(self, path: str) -> ImageSource:
        """The recordings that a user wants to predict.

        Args:
            path: A recording, or a folder that is searched recursively.

        Raises:
            QsdError: If there is no such file or folder, or no recording in the folder.
        """
        if not Path(path).is_dir():
            return self.files([str(regular_file(path, "predict_path"))], None)
        finder = ImageFinder(event_endings())
        found = finder.find(Path(path))
        if not found:
            raise QsdError(f"predict_path {shown(path)} holds no recording; known are {', '.join(event_endings())}.")
        finder.report(Path(path))
        return self.files(found, None)

    def train_transform(self) -> Transform:
        """See `ImageData`."""
        return Compose([to_tensor, self.augmentation])

    def eval_transform(self) -> Transform:
        """See `ImageData`."""
        return to_tensor

    @property
    def recordings(self) -> dict[str, Any]:
        """What a user of an exported network has to know of its recordings."""
        facts = {"frames": self.frames, "bin_ms": self.bin_ms, "layout": self.layout, "time_unit": self.time_unit}
        sensor = None if self.sensor is None else list(self.sensor)
        return {**facts, "sensor": sensor, "denoise_ms": self.denoise_ms}
