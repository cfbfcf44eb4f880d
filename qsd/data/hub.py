"""Data sets of Hugging Face's package ``datasets``: from its hub or cache, from parquet files, or saved to disk."""

import glob
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qsd.errors import QsdError
from qsd.limits import LARGEST_LABEL
from qsd.reading import regular_file, shown
from qsd.reading.images import BadImage, ExifOrientation, decode_image

_LARGEST_STATE = 1 << 24  # bytes of a file that lists the parts of a data set


class HubImages:
    """The images of a split.

    An image is the content of its file, in the data set itself. Paths and addresses in a data set are not opened.

    Args:
        dataset: The split.
        image_key: Column of the images.
        label_key: Column of their classes.
        split: Name of the split, for messages.
        exif_orientation: The rule of `qsd.data.load_image`.
        class_names: Classes of the training split, by which those of this split are numbered; ``None`` for its own.

    Attributes:
        class_names: Names of the classes, by label.
        texts: Whether the labels are texts.
        numbers: Whether the labels are numbers without names.
        labels: Class of each image ``[N]``.

    Raises:
        QsdError: If a column is missing or holds no classes.
    """

    def __init__(
        self,
        dataset: Any,
        image_key: str,
        label_key: str,
        split: str,
        exif_orientation: ExifOrientation = "upright",
        class_names: list[str] | None = None,
    ) -> None:
        import datasets

        self._split, self._orientation, self._key = split, exif_orientation, image_key
        dataset = dataset.with_format(None)
        for name, key in (("image_key", image_key), ("label_key", label_key)):
            if key not in dataset.column_names:
                columns = ", ".join(map(shown, dataset.column_names))
                raise QsdError(f"the split {split} has no column {key!r}; choose --data.{name} from {columns}.")
        values = dataset.select_columns([label_key]).with_format("numpy")[:][label_key]
        values, feature = np.asarray(values), dataset.features[label_key]
        self.texts = values.dtype.kind in "UO"
        self.numbers = values.dtype.kind in "iu" and not hasattr(feature, "names")
        self.class_names, self.labels = _classes(values, feature, split, class_names)
        if isinstance(dataset.features[image_key], datasets.Image):
            dataset = dataset.cast_column(image_key, datasets.Image(decode=False))
        dataset = dataset.select_columns([image_key])
        # Rows in an order of their own become a table in this order, as `_cells` has the order of the table.
        self._images = dataset if getattr(dataset, "_indices", None) is None else dataset.flatten_indices()
        self._cells: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cells": None}  # A data set is sent by the names of its files, a column by content.

    def load(self, index: int) -> Image.Image | BadImage:
        """See `qsd.data.dataset.ImageSource`."""
        if self._cells is None:
            # Arrow's column: a row of the data set costs a tenth of the time of decoding an image.
            self._cells = self._images.data.column(self._key)
        value = self._cells[index].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            return BadImage(self.name(index), "the data set does not hold the image itself; save it with its images")
        return decode_image(content, self.name(index), self._orientation)

    def name(self, index: int) -> str:
        """The split and the number of the image."""
        return f"{self._split} image {index}"


def load_split(name: str, root: Path | None, split: str, download: bool) -> Any:
    """A split as a ``datasets.Dataset``.

    Args:
        name: Name of the data set on the hub; empty for a folder.
        root: The folder of the data set, or for one of the hub the folder of the cache.
        split: Name of the split.
        download: Whether the data set may be fetched from the hub.

    Raises:
        QsdError: If the split cannot be found or read.
    """
    datasets = _datasets()
    try:
        if name:
            with _offline(not download):
                return datasets.load_dataset(name, split=split, cache_dir=None if root is None else str(root))
        assert root is not None
        if (folder := _saved(root, split)) is not None:
            return datasets.load_from_disk(str(folder))
        return _load_parquet(_parquet_files(root, split), split)
    except QsdError:
        raise
    except Exception as error:  # of the hub, of the network, of Arrow: the package lists no types
        fetched = "" if download or not name else "; --data.download true fetches it"
        reason = " ".join(str(error).split())[:300].removesuffix(".")
        raise QsdError(f"the split {split} of {name or root} cannot be read: {reason}{fetched}.") from error


def _load_parquet(paths: list[Path], split: str) -> Any:
    """The rows of parquet files.

    Raises:
        QsdError: If a file holds none, which the package tells by an error of its own code.
    """
    import datasets
    from pyarrow import parquet

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error says the same once more
    try:
        # The package takes names for patterns, in which a bracket stands for a set of letters.
        files = [glob.escape(str(path)) for path in paths]
        return datasets.load_dataset("parquet", data_files={split: files}, split=split)
    except datasets.exceptions.DatasetGenerationError as error:
        empty = next((path for path in paths if parquet.read_metadata(path).num_rows == 0), None)
        if empty is None:
            raise (error.__cause__ or error) from None
        raise QsdError(f"{shown(empty)} holds no rows; remove it, or write it again.") from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def has_split(root: Path, split: str) -> bool:
    """Whether a folder holds a split.

    Args:
        root: The folder of a data set.
        split: Name of the split.
    """
    return _saved(root, split) is not None or bool(_found_parquet(root, split))


def hub_splits(name: str, root: Path | None, download: bool) -> Sequence[str]:
    """The splits of a data set of the hub.

    Args:
        name: Name of the data set.
        root: The folder of the cache.
        download: Whether the hub may be asked.

    Raises:
        QsdError: If neither the cache nor the hub knows it.
    """
    try:
        with _offline(not download):
            builder = _datasets().load_dataset_builder(name, cache_dir=None if root is None else str(root))
        return list(builder.info.splits or ())
    except Exception as error:  # as above
        fetched = "" if download else "; --data.download true fetches it"
        raise QsdError(f"{name} cannot be found: {' '.join(str(error).split())[:300]}{fetched}.") from error


def _classes(
    values: np.ndarray[Any, Any], feature: Any, split: str, known: list[str] | None
) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Names of the classes, and the label of each image; names that are known decide the numbers of the classes."""
    names = getattr(feature, "names", None)
    if names is None and values.ndim == 1 and values.dtype.kind in "UO":
        names, values = np.unique(values.astype(str), return_inverse=True)
    elif values.ndim != 1 or values.dtype.kind not in "iu":
        raise QsdError(f"the labels of the split {split} are neither whole numbers nor texts; see --data.label_key.")
    most = LARGEST_LABEL if names is None else len(names) - 1
    if len(values) and not -1 <= values.min() <= values.max() <= most:
        wrong = values.min() if values.min() < -1 else values.max()
        fault = "which is no class" if names is None else f"and its columns name {len(names)} classes"
        raise QsdError(f"the split {split} has the label {wrong}, {fault}; see --data.label_key.")
    values = values.astype(np.int64)
    if names is None:
        return known or [str(number) for number in range(int(values.max(initial=-1)) + 1)], values
    names = [str(name) for name in names]
    if known is None or names == known:
        return names, values
    if unknown := [names[label] for label in np.unique(values) if label >= 0 and names[label] not in known]:
        raise QsdError(f"the split {split} has the class {shown(unknown[0])}, which the training split lacks.")
    number = np.array([known.index(name) if name in known else -1 for name in names] + [-1])  # -1 stays -1
    return known, number[values]


def _saved(root: Path, split: str) -> Path | None:
    """The folder of a split that ``save_to_disk`` wrote, all of whose files lie in it.

    A data set without the name of a split is the training split: as every split, it would validate on what it trains.
    """
    folder = next((path for path in (root / split, root) if (path / "state.json").is_file()), None)
    if folder is None:
        return None
    path = regular_file(folder / "state.json")
    try:
        state = json.loads(path.read_bytes()[:_LARGEST_STATE])
        files = [entry["filename"] for entry in state["_data_files"]]
        if folder == root and (state.get("_split") or "train") != split:
            return None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise QsdError(f"{shown(path)} is damaged; save the data set again.") from error
    outside = [file for file in files if not isinstance(file, str) or Path(file).name != file]
    if outside:
        raise QsdError(f"{shown(path)} names a file outside of its folder, {shown(str(outside[0]))}; save it again.")
    return folder


def _parquet_files(root: Path, split: str) -> list[Path]:
    found = _found_parquet(root, split)
    if not found:
        raise QsdError(
            f"{shown(root)} has no split {split}: neither a data set saved to disk nor parquet files "
            f"{split}-*.parquet or {split}/*.parquet are in it."
        )
    return found


def _found_parquet(root: Path, split: str) -> list[Path]:
    pattern = re.compile(rf"{re.escape(split)}([-_.].*)?\.parquet")
    files = [
        path for folder in (root, root / "data") for path in folder.glob("*.parquet") if pattern.fullmatch(path.name)
    ]
    return sorted(files or (root / split).glob("*.parquet"))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise QsdError("reading these data sets needs more packages: pip install 'qsd[data]'.") from error
    return datasets


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Let the hub's packages use their cache alone."""
    import datasets
    from huggingface_hub import constants

    modules: list[tuple[Any, bool]] = [(datasets.config, datasets.config.HF_HUB_OFFLINE)]
    modules.append((constants, constants.HF_HUB_OFFLINE))
    try:
        for module, before in modules:
            module.HF_HUB_OFFLINE = offline or before
        yield
    finally:
        for module, before in modules:
            module.HF_HUB_OFFLINE = before
