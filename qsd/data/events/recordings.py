"""Sources of recordings as frames, from files and from memory, and their cache on disk."""

import hashlib
import os
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from qsd._version import __version__
from qsd.data.events.frames import Array, Binning
from qsd.errors import QsdError
from qsd.files import replacing
from qsd.reading.events import EventFormat, Events, load_events
from qsd.reading.images import BadImage


def read_frames(path: str, binning: Binning, layout: EventFormat, time_unit: str, denoise_ms: float | None) -> Any:
    """Read a recording and count its events.

    Args:
        path: The file.
        binning: How events become frames.
        layout: Layout of the file where its ending does not tell it.
        time_unit: Unit of the times in structured arrays.
        denoise_ms: Events without another one beside them within so many milliseconds are left out; ``None`` for none.

    Returns:
        Counts ``[F, 2, H, W]``, or the reason why there are none.
    """
    events = load_events(path, layout, time_unit)
    if isinstance(events, BadImage):
        return events
    try:
        return binning(events if denoise_ms is None else _denoised(events, denoise_ms))
    except ValueError as error:
        return BadImage(path, str(error))


def _denoised(events: Events, milliseconds: float) -> Events:
    try:
        from tonic import transforms
    except ImportError as error:
        raise QsdError("denoise_ms needs tonic: pip install 'qsd[events]'.") from error
    array = np.empty(len(events.t), dtype=[("x", np.int32), ("y", np.int32), ("t", np.int64), ("p", np.int32)])
    for name in "xytp":
        array[name] = getattr(events, name)
    left = transforms.Denoise(filter_time=milliseconds * 1e3)(array)
    if not len(left):
        raise ValueError(f"no event is left of it with denoise_ms={milliseconds:g}")
    return Events(left["x"], left["y"], left["t"].astype(np.float64), left["p"])


class RecordingFiles:
    """Recordings on disk, as frames.

    Args:
        paths: The files.
        labels: Their classes; ``None`` if they are unknown.
        binning: How events become frames.
        layout: Layout of the files where their endings do not tell it.
        time_unit: Unit of the times in structured arrays.
        denoise_ms: See `read_frames`.
        cache: Folder that keeps the frames, by content of the settings and by size and time of the file; ``None`` reads
            the events every time.

    Raises:
        QsdError: If the folder cannot be made.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int] | None,
        binning: Binning,
        layout: EventFormat = "auto",
        time_unit: str = "us",
        denoise_ms: float | None = None,
        cache: str | None = None,
    ) -> None:
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.asarray(labels if labels is not None else [-1] * len(paths), dtype=np.int64)
        self._binning, self._how = binning, (layout, time_unit, denoise_ms)
        self._cache = None if cache is None else Path(cache)
        if self._cache is not None:
            try:
                self._cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise QsdError(f"the folder cache={cache} cannot be made: {error.strerror}.") from error

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """The path of the file."""
        return os.fsdecode(bytes(self._paths[index]))

    def load(self, index: int) -> Any:
        """Counts ``[F, 2, H, W]`` of one recording, or the reason why there are none."""
        path = self.name(index)
        kept = None if self._cache is None else self._cached_file(path)
        if kept is not None and (frames := self._read_cache(kept)) is not None:
            return frames
        frames = read_frames(path, self._binning, *self._how)
        if kept is not None and not isinstance(frames, BadImage):
            # A folder that may only be read, or a full disk, costs time alone.
            with suppress(OSError, QsdError):
                kept.parent.mkdir(parents=True, exist_ok=True)
                with replacing(kept) as partial, partial.open("wb") as file:
                    np.savez_compressed(file, frames=frames)
        return frames

    def _cached_file(self, path: str) -> Path | None:
        """The file that keeps the frames of a recording; ``None`` where the recording cannot be reached."""
        assert self._cache is not None
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return None  # Reading it tells the reason.
        settings = (__version__, os.path.abspath(path), status.st_size, status.st_mtime_ns, self._binning, self._how)
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()
        return self._cache / digest[:2] / f"{digest[2:34]}.npz"

    def _read_cache(self, kept: Path) -> Array | None:
        """The frames that a file keeps; a file that is missing or damaged is written again."""
        shape = (self._binning.frames, 2, *self._binning.img_size)
        try:
            with np.load(kept, allow_pickle=False) as content:
                frames: Array = content["frames"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile):
            return None
        return frames if frames.shape == shape and frames.dtype == np.uint16 else None


class RecordingArrays:
    """Recordings in memory.

    Args:
        events: The recordings.
        labels: Their classes.
        names: Their names.
        binning: How events become frames.
    """

    def __init__(self, events: Sequence[Events], labels: Any, names: Sequence[str], binning: Binning) -> None:
        self.events, self._names = events, names
        self.labels = np.asarray(labels, dtype=np.int64)
        self._frames = [binning(recording) for recording in events]

    def __len__(self) -> int:
        return len(self.events)

    def load(self, index: int) -> Array:
        """Counts ``[F, 2, H, W]`` of one recording."""
        return self._frames[index]

    def name(self, index: int) -> str:
        """The name of one recording."""
        return self._names[index]
