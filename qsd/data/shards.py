"""Images in tar files, with random access: WebDataset's shards, and archives with one folder for each class.

Each archive is read through once for its index: where each image lies, and its class. The index is stored in the
user's folder of caches as plain arrays, and made again when the archive changes.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

from qsd.errors import QsdError
from qsd.files import cache_folder, replacing
from qsd.limits import LARGEST_LABEL
from qsd.reading import FileError, read_safetensors, regular_file, shown
from qsd.reading.images import BadImage, ExifOrientation, decode_image, image_endings
from qsd.reading.tar_files import Member, read_member, tar_members

logger = logging.getLogger(__name__)

_VERSION = 2
_LARGEST_LABEL = 1 << 20  # bytes of a file with the label of an image


@dataclass(frozen=True)
class Index:
    """The images of an archive.

    Attributes:
        offsets: First byte of each image, int64 ``[N]``.
        sizes: Bytes of each image, int64 ``[N]``.
        names: Name of each image, bytes ``[N]``.
        classes: Name or number of the class of each image, bytes ``[N]``; "-1" for an image without a class.
    """

    offsets: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]
    names: np.ndarray[Any, Any]
    classes: np.ndarray[Any, Any]


class ShardImages:
    """The images of several archives.

    Args:
        paths: The archives.
        indices: Their indices.
        labels: Classes of all images, one archive after the other ``[N]``.
        exif_orientation: The rule of `qsd.data.load_image`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        indices: Sequence[Index],
        labels: np.ndarray[Any, Any],
        exif_orientation: ExifOrientation = "upright",
    ) -> None:
        # Blocks of bytes, which processes share; see `qsd.data.dataset.ImageFiles`.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self._shards = np.repeat(np.arange(len(paths)), [len(index.offsets) for index in indices])
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        self._names = np.concatenate([index.names for index in indices])
        self._orientation = exif_orientation
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._offsets)

    def load(self, index: int) -> Image.Image | BadImage:
        """See `qsd.data.dataset.ImageSource`."""
        try:
            content = read_member(self._path(index), int(self._offsets[index]), int(self._sizes[index]))
        except OSError as error:
            return BadImage(self.name(index), error.strerror or str(error))
        return decode_image(content, self.name(index), self._orientation)

    def name(self, index: int) -> str:
        """The archive and the name of the image in it."""
        return f"{self._path(index)}/{os.fsdecode(bytes(self._names[index]))}"

    def _path(self, index: int) -> str:
        return os.fsdecode(bytes(self._paths[self._shards[index]]))


def index_shard(path: Path, label_key: str | None, in_folders: bool) -> Index:
    """The index of an archive, from the cache or by reading its headers.

    Args:
        path: The archive.
        label_key: Field of each sample's ``.json`` that holds its class; ``None`` for the number in its ``.cls``.
        in_folders: Whether the class of an image is the folder that it lies in, or without one the archive's name, and
            not in a file beside it.

    Raises:
        QsdError: If the archive is damaged, has two images of one name, or the class of an image is missing.
    """
    status = regular_file(path, "tar file").stat()
    kind = json.dumps([_VERSION, os.path.abspath(path), label_key, in_folders])
    state = {"size": str(status.st_size), "modified": str(status.st_mtime_ns), "kind": kind}
    cached = cache_folder() / "shards" / f"{hashlib.sha256(kind.encode()).hexdigest()[:32]}.safetensors"
    index = _read_index(cached, state)
    if index is None:
        logger.info("reading the headers of %s once.", shown(path))
        found = list(_in_folders(path) if in_folders else _samples(path, label_key))
        members = [member for member, _ in found]
        _check_names(path, members)
        index = Index(
            np.array([member.offset for member in members], np.int64),
            np.array([member.size for member in members], np.int64),
            np.array([os.fsencode(member.name) for member in members], np.bytes_),
            np.array([os.fsencode(label) for _, label in found], np.bytes_),
        )
        _write_index(cached, state, index)
    return index


def _check_names(path: Path, members: Sequence[Member]) -> None:
    """Refuse an archive to which a file was appended a second time, which would be seen twice in an epoch."""
    counted = Counter(member.name for member in members)
    if counted and (most := counted.most_common(1)[0])[1] > 1:
        raise QsdError(f"{shown(path)} holds the image {shown(most[0])} {most[1]} times; write the archive anew.")


def _in_folders(path: Path) -> Iterator[tuple[Member, str]]:
    """Images that are not hidden, each with the name of its folder."""
    for member in tar_members(path):
        hidden = any(part.startswith(".") for part in PurePosixPath(member.name).parts)
        if member.name.lower().endswith(image_endings()) and not hidden:
            yield member, PurePosixPath(member.name).parent.name or path.stem


def _samples(path: Path, label_key: str | None) -> Iterator[tuple[Member, str]]:
    """Images, each with the class that the files of the same name tell, which follow one another."""
    sample, files = "", dict[str, Member]()
    for member in tar_members(path):
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        name = f"{folder}/{stem}"
        if name != sample:
            yield from _sample(path, files, label_key)
            sample, files = name, {}
        if ending.lower() in files:
            raise QsdError(f"{shown(path)} holds {shown(member.name)} several times; write the archive anew.")
        files[ending.lower()] = member
    yield from _sample(path, files, label_key)


def _sample(path: Path, files: dict[str, Member], label_key: str | None) -> Iterator[tuple[Member, str]]:
    image = next((file for ending, file in files.items() if f".{ending}" in image_endings()), None)
    if image is None:
        return
    ending = "cls" if label_key is None else "json"
    where = f"{shown(path)}: the image {shown(image.name)}"
    if ending not in files:
        raise QsdError(f"{where} has no .{ending} beside it; name the field of the .json with --data.label_key.")
    member = files[ending]
    if member.size > _LARGEST_LABEL:
        raise QsdError(f"{where} has a .{ending} of {member.size} bytes, which is no label.")
    content = read_member(path, member.offset, member.size)
    try:
        label = _whole(content if label_key is None else _field(json.loads(content), label_key))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        field = "" if label_key is None else f" in the field {label_key!r}"
        raise QsdError(f"{where} has no whole number as its label in .{ending}{field}.") from error
    if not -1 <= label <= LARGEST_LABEL:  # timm marks images without a class by -1
        raise QsdError(f"{where} has the label {label}, which is no class.")
    yield image, str(label)


def _whole(value: Any) -> int:
    """A whole number out of a file; fractions are not rounded."""
    if isinstance(value, float) and not value.is_integer():
        raise ValueError("no whole number")
    return int(value)


def _field(content: Any, key: str) -> Any:
    for part in (key,) if isinstance(content, dict) and key in content else key.split("/"):
        content = content[part]
    return content


def _read_index(cached: Path, state: dict[str, str]) -> Index | None:
    """An index out of the cache, if it is that of the present archive."""
    try:
        metadata, tensors = read_safetensors(cached, "index")
    except FileError:
        return None
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    offsets, sizes, names, classes = (arrays.get(key) for key in ("offsets", "sizes", "names", "classes"))
    if metadata != state or offsets is None or sizes is None or names is None or classes is None:
        return None
    if not _fits(offsets, sizes, names, classes, int(state["size"])):
        return None
    texts = [np.ascontiguousarray(text).view(f"S{text.shape[1]}")[:, 0] for text in (names, classes)]
    return Index(offsets, sizes, texts[0], texts[1])


def _fits(offsets: Any, sizes: Any, names: Any, classes: Any, archive: int) -> bool:
    """Whether the arrays of an index have the types and sizes that were written, for an archive of so many bytes."""
    numbers, texts = (offsets, sizes), (names, classes)
    return (
        all(array.dtype == np.int64 and array.shape == (len(offsets),) for array in numbers)
        and all(text.dtype == np.uint8 and text.ndim == 2 and len(text) == len(offsets) for text in texts)
        and bool(((offsets >= 0) & (sizes >= 0) & (offsets <= archive - sizes)).all())
    )


def _write_index(cached: Path, state: dict[str, str], index: Index) -> None:
    if not len(index.offsets):
        return
    arrays = {"offsets": index.offsets, "sizes": index.sizes}
    for key, text in (("names", index.names), ("classes", index.classes)):
        arrays[key] = np.frombuffer(text.tobytes(), np.uint8).reshape(len(text), -1)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cached) as partial:
            safetensors.numpy.save_file(arrays, partial, state)
    except (OSError, QsdError) as error:
        logger.warning("the index of a tar file cannot be stored and is made again each time: %s", error)
