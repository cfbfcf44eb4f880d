"""From a recording of an event camera to arrays of events; a broken file becomes a value, not an exception.

Structured arrays (``.npy``, ``.npz``, HDF5) are read here, and the formats of cameras by `qsd.reading.cameras`. No
reader unpickles or follows links to other files.
"""

import os
import stat
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from qsd.errors import QsdError
from qsd.reading.cameras import EventFormat, NoRecording, needed, read_aedat, read_aedat4, read_bin
from qsd.reading.images import BadImage

__all__ = ["EventFormat", "Events", "event_endings", "load_events", "sorted_events"]

Array = np.ndarray[Any, Any]
MICROSECONDS = {"us": 1.0, "ms": 1e3, "s": 1e6, "ns": 1e-3}
# Names of the four fields of an event in structured arrays and HDF5 files.
_FIELDS = {
    "x": ("x",),
    "y": ("y",),
    "t": ("t", "ts", "time", "timestamp", "timestamps"),
    "p": ("p", "pol", "polarity", "polarities"),
}
_MOST_EVENTS = 1 << 28
_MOST_BYTES = 1 << 33  # of the arrays in a compressed file
_LATEST = 2.0**51  # microseconds, 71 years: differences of such times are exact
_GROUPS = ("", "events", "CD/events")  # where HDF5 files keep their events


class Events(NamedTuple):
    """The events of a recording, in the order of time.

    Attributes:
        x: Columns ``[N]``, int32.
        y: Rows ``[N]``, int32.
        t: Times in microseconds ``[N]``, float64.
        p: Polarities ``[N]``, int32: 1 where it became brighter, 0 where it became darker.
    """

    x: Array
    y: Array
    t: Array
    p: Array


def event_endings() -> tuple[str, ...]:
    """The endings of file names, in lower case, that are taken for recordings."""
    return tuple(_READERS)


def load_events(path: str, layout: EventFormat = "auto", time_unit: str = "us") -> Events | BadImage:
    """Read a recording completely.

    Args:
        path: The file.
        layout: Layout of the file where its ending does not tell it.
        time_unit: Unit of the times in structured arrays: ``"us"``, ``"ms"``, ``"s"`` or ``"ns"``.

    Returns:
        The events, sorted by time, or the reason why there are none.

    Raises:
        QsdError: If a package that reads the format is missing, or an argument is unknown.
    """
    check_layout(layout, time_unit)
    read = _READERS.get(Path(path).suffix.lower())
    if read is None:
        return BadImage(path, f"its ending is none of a recording; known are {', '.join(event_endings())}")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return BadImage(path, "it is a folder, pipe, socket or device, no file")
        if status.st_size == 0:
            return BadImage(path, "the file is empty")
        fields, unit = read(path, layout)
        return _checked(fields, MICROSECONDS[unit or time_unit])
    except (MemoryError, QsdError):
        raise  # which are not the file's fault
    except NoRecording as problem:
        return BadImage(path, str(problem))
    except BaseException as error:  # readers list no types, and Rust's panics are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        return BadImage(path, lines[0][:200].replace(repr(path), "the file"))


def check_layout(layout: str, time_unit: str) -> None:
    """Refuse an unknown layout or unit of time.

    Args:
        layout: Name of a layout.
        time_unit: Name of a unit.

    Raises:
        QsdError: If one of them is unknown.
    """
    if layout not in get_args(EventFormat):
        raise QsdError(f"layout={layout!r} is unknown; use one of {', '.join(get_args(EventFormat))}.")
    if time_unit not in MICROSECONDS:
        raise QsdError(f"time_unit={time_unit!r} is unknown; use one of {', '.join(MICROSECONDS)}.")


def sorted_events(x: Array, y: Array, t: Array, p: Array) -> Events:
    """Events in the order of time; those of equal times keep their order.

    Args:
        x: Columns ``[N]``.
        y: Rows ``[N]``.
        t: Times in microseconds ``[N]``.
        p: Polarities ``[N]``; positive numbers are brighter.
    """
    times = np.asarray(t, dtype=np.float64)
    events = Events(
        np.asarray(x, dtype=np.int32),
        np.asarray(y, dtype=np.int32),
        times,
        (np.asarray(p) > 0).astype(np.int32),
    )
    if len(times) > 1 and bool((times[1:] < times[:-1]).any()):
        order = np.argsort(times, kind="stable")
        events = Events(*(field[order] for field in events))
    return events


def _checked(fields: Mapping[str, Array], unit: float) -> Events:
    lengths = {len(field) for field in fields.values()}
    if len(lengths) != 1:
        raise NoRecording(f"its fields have different lengths: {sorted(lengths)}")
    if not lengths.pop():
        raise NoRecording("it holds no event")
    for name, field in fields.items():
        if field.ndim != 1 or field.dtype.kind not in "iufb":
            raise NoRecording(f"its field {name} is no list of numbers, but {field.dtype} of {field.ndim} dimensions")
        if field.dtype.kind == "f" and not bool(np.isfinite(field).all()):
            raise NoRecording(f"its field {name} holds values that are not finite")
    for name in "xy":
        low, high = fields[name].min(), fields[name].max()
        if low < 0 or high >= 1 << 15:
            raise NoRecording(f"its field {name} goes from {low} to {high}, which is no range of pixels")
    low, high = fields["p"].min(), fields["p"].max()
    if low < -1 or high > 1 or (fields["p"].dtype.kind == "f" and bool((fields["p"] % 1).any())):
        raise NoRecording(f"its field p goes from {low} to {high}, where polarities are 0 or -1 and 1")
    with np.errstate(over="ignore"):
        times = fields["t"].astype(np.float64) * unit
    if times.min() <= -_LATEST or times.max() >= _LATEST:
        raise NoRecording(
            f"its times go from {times.min():g} to {times.max():g} microseconds, and 71 years are the most"
        )
    return sorted_events(fields["x"], fields["y"], times, fields["p"])


def _named(names: tuple[str, ...] | list[str], get: Callable[[str], Any]) -> dict[str, Any]:
    """The four fields by their names, whatever a file calls them."""
    found = {}
    for field, known in _FIELDS.items():
        name = next((name for name in known if name in names), None)
        if name is None:
            raise NoRecording(
                f"it has no field {' or '.join(known)}; its fields are {', '.join(names)[:100] or 'none'}"
            )
        found[field] = get(name)
    return found


# -- arrays of NumPy ---------------------------------------------------------------------------------------------------


def _read_array(stream: Any, size: int) -> Array:
    """An array whose header was checked before its memory was allocated."""
    version = np.lib.format.read_magic(stream)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if header is None:
        raise NoRecording(f"its array has the version {version} of NumPy's format, where 1 and 2 are read")
    shape, fortran, dtype = header(stream)
    if dtype.hasobject:
        raise NoRecording("it holds an array of objects, which would run code; save numbers instead")
    count = int(np.prod(shape, dtype=np.float64)) if shape else 1
    if count > _MOST_EVENTS * 4 or count * dtype.itemsize > size:
        raise NoRecording(f"its header tells of {count} values, more than the file holds")
    values = np.frombuffer(stream.read(count * dtype.itemsize), dtype=dtype)
    if len(values) != count:
        raise NoRecording("the file is truncated")
    return values.reshape(shape, order="F" if fortran else "C")


def _fields_of(array: Array, layout: EventFormat) -> dict[str, Array]:
    if array.dtype.names is not None:
        return _named(array.dtype.names, lambda name: array[name].reshape(-1))
    if layout == "gesture" and array.ndim == 2 and array.shape[1] >= 4:
        return dict(zip("xypt", array[:, :4].T))
    raise NoRecording(f"its array of {array.dtype} and shape {array.shape} has no fields x, y, t and p")


def _read_npy(path: str, layout: EventFormat) -> tuple[Mapping[str, Array], str | None]:
    with open(path, "rb") as stream:
        array = _read_array(stream, os.path.getsize(path))
    return _fields_of(array, layout), "ms" if layout == "gesture" else None


def _read_npz(path: str, layout: EventFormat) -> tuple[Mapping[str, Array], str | None]:
    with zipfile.ZipFile(path) as archive:
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist() if m.filename.endswith(".npy")}
        if sum(member.file_size for member in members.values()) > _MOST_BYTES:
            raise NoRecording("its arrays need more than 8 GiB of memory")

        def get(name: str) -> Array:
            with archive.open(members[name]) as stream:
                return _read_array(stream, members[name].file_size)

        if len(members) == 1:
            return _fields_of(get(next(iter(members))), layout), None
        return _named(list(members), get), None


# -- HDF5 --------------------------------------------------------------------------------------------------------------


def _read_hdf5(path: str, layout: EventFormat) -> tuple[Mapping[str, Array], str | None]:
    with needed("h5py"):
        import h5py
    with h5py.File(path, "r") as file:
        for name in _GROUPS:
            found = _follow(file, name)
            if isinstance(found, h5py.Dataset):
                return _fields_of(_dataset(found), layout), None
            if isinstance(found, h5py.Group) and any(key in found for key in _FIELDS["t"]):
                return _named(list(found), partial(_column, found)), None
    raise NoRecording("it has no fields x, y, t and p, neither at its root nor in a group events")


def _column(group: Any, name: str) -> Array:
    return _dataset(_follow(group, name)).reshape(-1)


def _follow(group: Any, path: str) -> Any:
    """A part of an HDF5 file, by hard links alone, which cannot lead out of the file."""
    import h5py

    for key in path.split("/") if path else ():
        if not isinstance(group, h5py.Group) or key not in group.keys():  # noqa: SIM118 - not a dictionary
            return None
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise NoRecording(f"its part {path} is a link, perhaps to another file, which is not followed")
        group = group[key]
    return group


def _dataset(dataset: Any) -> Array:
    import h5py

    if not isinstance(dataset, h5py.Dataset):
        raise NoRecording("one of its fields is a group, where numbers belong")
    if dataset.external or dataset.is_virtual:
        raise NoRecording("its numbers lie in another file, which is not read")
    if dataset.dtype.hasobject:
        raise NoRecording("it holds an array of objects; save numbers instead")
    if dataset.size is None or dataset.size > _MOST_EVENTS:
        raise NoRecording(f"it holds {dataset.size} events, and at most {_MOST_EVENTS} are read")
    values: Array = dataset[()]
    return values


_READERS: dict[str, Callable[[str, EventFormat], tuple[Mapping[str, Array], str | None]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
    ".aedat": read_aedat,
    ".aedat4": read_aedat4,
    ".bin": read_bin,
}
