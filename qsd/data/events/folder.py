"""Folders of one's own recordings."""

from pathlib import Path
from typing import Literal

from qsd.data.base import Part
from qsd.data.class_folders import ClassFolders
from qsd.data.events.base import EventData
from qsd.data.events.frames import FrameAugmentation
from qsd.data.events.recordings import RecordingFiles
from qsd.errors import QsdError
from qsd.reading.events import EventFormat, event_endings


class EventFolderData(EventData):
    """``root/train/<class>/*`` and ``root/val/<class>/*`` (or ``validation``), and perhaps ``root/test/<class>/*``.

    Files are arrays with the fields x, y, t and p (``.npy``, ``.npz`` or ``.h5``), or recordings of cameras that tonic
    reads (``.aedat``, ``.aedat4``, ``.bin``). Folders and labels are as in `ImageFolderData`.

    Args:
        root: Folder that holds ``train`` and ``val``.
        frames: Number F of frames.
        img_size: Height and width of the frames in pixels; one number for a square.
        sensor: Height and width of the sensor in pixels; one number for a square, and ``None`` for the largest
            coordinates of each recording, which may differ.
        batch_size: Recordings per step and process.
        num_workers: Loading processes per training process; 0 loads in the training process, None chooses the number
            of cores per training process, at most 8.
        bin_ms: Length of a bin in milliseconds, from the first event on; ``None`` divides each recording into equal
            parts.
        time_unit: Unit of the times in structured arrays: ``"us"``, ``"ms"``, ``"s"`` or ``"ns"``.
        layout: Layout of the addresses in ``.aedat`` files: ``"dvs128"`` or ``"ibm"``.
        denoise_ms: Events without another one beside them within so many milliseconds are left out; ``None`` for none.
        cache: Folder that keeps the frames of recordings; ``None`` reads their events every time.
        degrees: Greatest angle by which training recordings are turned.
        shift: Greatest shift of training recordings, as share of the side.
        hflip: Probability of the horizontal flip in training.
        drop: Greatest share of events that are dropped in training.
        seed: Seed of order and augmentation; None takes that of ``seed_everything``, or 0.
        predict_path: A recording, or a folder searched recursively, to predict; None predicts the test part.
        on_bad_image: ``"error"`` stops at a recording that cannot be read; ``"skip"`` replaces it by the next one in
            training, leaves it out elsewhere, and reports it.
    """

    def __init__(
        self,
        root: str,
        frames: int = 8,
        img_size: int | tuple[int, int] = 64,
        sensor: int | tuple[int, int] | None = None,
        batch_size: int = 16,
        num_workers: int | None = None,
        bin_ms: float | None = None,
        time_unit: str = "us",
        layout: EventFormat = "auto",
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
        self.sensor = (sensor, sensor) if isinstance(sensor, int) else sensor
        if self.sensor is not None and min(self.sensor) < 1:
            raise QsdError(f"sensor={sensor} has no pixels.")
        super().__init__(
            frames, img_size, batch_size, num_workers, FrameAugmentation(degrees, shift, 0.0, hflip, drop), bin_ms,
            seed, predict_path, on_bad_image, layout, time_unit, denoise_ms, cache,
        )  # fmt: skip
        self._folders = ClassFolders(Path(root), event_endings(), "recording")

    @property
    def class_names(self) -> list[str]:
        """The name of every class folder, by label."""
        return self._folders.class_names

    def load_part(self, part: Part) -> RecordingFiles:
        """List the files of one part.

        Args:
            part: "train", "val" or "test".
        """
        return self.files(*self._folders.list_part(part))
