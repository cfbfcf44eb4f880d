"""Annotation files in COCO's format, checked as a whole before a training reads them.

Lists of one field are checked at once, and single entries are only looked at to name the first wrong one: COCO's 860
thousand boxes take seconds.
"""

import gc
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json
from rich.progress import Progress

from qsd.errors import QsdError
from qsd.mm.outlines import NUMBERS, are_polygons, floats, polygon_problem, run_problem, shortened
from qsd.reading.files import FileError, regular_file, shown

logger = logging.getLogger(__name__)

_LARGE = 100_000_000  # bytes of a file from which on a progress bar is shown
_CHUNK = 20_000  # annotations whose outlines are checked at a time
_IDS = frozenset({int, str})
_FLAGS = frozenset({int, bool, float, type(None)})
_LONGEST = 2**20  # pixels of an image's side


@dataclass(frozen=True)
class Use:
    """The part of an annotation file that a training or an evaluation reads.

    Attributes:
        classes: Names of the classes, or ``None`` for all categories of the file.
        boxes: Whether annotations must be there; official files of test sets have none.
        masks: Whether outlines (``segmentation``) are read.
        all_masks: Whether outlines of annotations without area are read, too, as COCO's metric does.
        folder: Local folder of the images, which must exist and have contents, or ``None`` not to look.
    """

    classes: Sequence[str] | None
    boxes: bool = True
    masks: bool = False
    all_masks: bool = False
    folder: str | None = None


class _File:
    """The entries of a file, and the words for what is wrong with one of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.numbers: Sequence[int] | None = None  # of the entries at hand in the file, where they are some of them

    def error(self, part: str, index: int, entries: Sequence[Any], problem: str) -> QsdError:
        entry = entries[index]
        index = index if self.numbers is None else self.numbers[index]
        name = f" (id {shown(entry['id'])[:40]})" if isinstance(entry, dict) and "id" in entry else ""
        return QsdError(f"{shown(self.path)}: {part}[{index}]{name} {problem}.")

    def entries(self, content: dict[str, Any], part: str) -> list[dict[str, Any]]:
        found = content.get(part)
        if not isinstance(found, list):
            kind = "has no list" if found is None else f"has a {type(found).__name__} where a list belongs, under"
            raise QsdError(f"{shown(self.path)} {kind} {part!r}; it is no annotation file in COCO's format.")
        if set(map(type, found)) - {dict}:
            index = next(i for i, entry in enumerate(found) if type(entry) is not dict)
            raise self.error(part, index, found, f"is a {type(found[index]).__name__}, where a dictionary belongs")
        return found

    def column(self, part: str, entries: Sequence[dict[str, Any]], field: str, kinds: frozenset[type]) -> list[Any]:
        """One field of all entries, all of given types."""
        try:
            values = [entry[field] for entry in entries]
        except KeyError:
            index = next(i for i, entry in enumerate(entries) if field not in entry)
            raise self.error(part, index, entries, f"has no field {field!r}") from None
        if not set(map(type, values)) <= kinds:
            index = next(i for i, value in enumerate(values) if type(value) not in kinds)
            wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
            problem = f"has {field}={shortened(values[index])}, where {wanted} belongs"
            raise self.error(part, index, entries, problem)
        return values

    def unique(self, part: str, entries: Sequence[dict[str, Any]], field: str, kinds: frozenset[type]) -> list[Any]:
        values = self.column(part, entries, field, kinds)
        if len(set(values)) < len(values):
            first: dict[Any, int] = {}
            index = next(i for i, value in enumerate(values) if first.setdefault(value, i) != i)
            raise self.error(part, index, entries, f"repeats {field}={shortened(values[index])} of an earlier entry")
        return values


@contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection while millions of containers without cycles come to be: it would walk over all of them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collections()
def check_annotations(path: str | Path, use: Use) -> dict[str, int]:
    """Check a whole annotation file in COCO's format.

    Asked for are the fields that the training reads. Annotations that OpenMMLab passes over (boxes without area or
    outside their image, crowds, other categories) are counted.

    Args:
        path: Path of the file.
        use: The part of it that is read.

    Returns:
        Numbers of images, annotations, and of each kind that is passed over.

    Raises:
        QsdError: With file, entry and field of the first thing that is wrong.
    """
    path = regular_file(path, "annotation file")
    file, content = _File(path), _load(path)
    images = file.entries(content, "images")
    names = file.column("images", images, "file_name", frozenset({str}))
    ids = file.unique("images", images, "id", _IDS)
    sizes = {}
    for field in ("height", "width"):
        sizes[field] = file.column("images", images, field, NUMBERS)
        if images and not all(1 <= value <= _LONGEST for value in sizes[field]):  # NaN fails, too
            index = next(i for i, value in enumerate(sizes[field]) if not 1 <= value <= _LONGEST)
            raise file.error("images", index, images, f"has {field}={shortened(sizes[field][index])}, which is no size")
    if use.folder is not None:
        check_images([os.path.join(use.folder, name) for name in names])
    categories = _check_categories(file, content, use)
    counts = {"images": len(images), "annotations": 0}
    if not use.boxes and "annotations" not in content:
        return counts
    annotations = file.entries(content, "annotations")
    counts["annotations"] = len(annotations)
    places = {identity: index for index, identity in enumerate(ids)}
    shapes = np.stack([floats(sizes["height"]), floats(sizes["width"])], 1).reshape(-1, 2)
    with Progress(transient=True, disable=path.stat().st_size < _LARGE) as progress:
        used, read = _check_boxes(file, annotations, places, shapes, categories, counts)
        if use.masks:
            _check_masks(file, annotations, read if use.all_masks else used, places, shapes, progress)
    _report(path, counts)
    return counts


def check_images(paths: Sequence[str]) -> None:
    """Refuse image files that are missing, empty, or no files.

    Args:
        paths: Paths of local files.

    Raises:
        QsdError: With the first of them.
    """

    def look(path: str) -> str | None:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return (
                f"the data need {shown(path)}, which does not exist; correct data_root, or the data set's data_prefix."
            )
        except (OSError, ValueError) as error:
            return f"image {shown(path)} cannot be read: {error}."
        if not stat.S_ISREG(status.st_mode):
            return f"image {shown(path)} is no file, but a folder, pipe or device."
        return None if status.st_size else f"image {shown(path)} is an empty file; restore or remove it."

    with ThreadPoolExecutor(8) as pool:  # on a network's file system each look is a wait
        for problem in pool.map(look, paths, chunksize=1):
            if problem is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                raise QsdError(problem)


def _load(path: Path) -> dict[str, Any]:
    try:
        # Python's own parser takes several times as long as all checks together.
        content = from_json(path.read_bytes(), allow_inf_nan=True)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{shown(path)} is no JSON, or is cut off ({' '.join(str(error).split())[:200]}).") from error
    except OSError as error:
        raise FileError(f"{shown(path)} cannot be read: {error.strerror or error}.") from error
    if not isinstance(content, dict):
        raise FileError(f"{shown(path)} holds a {type(content).__name__}; annotation files hold a dictionary.")
    return content


def _check_categories(file: _File, content: dict[str, Any], use: Use) -> set[Any]:
    """The ids of the categories that are read."""
    entries = file.entries(content, "categories")
    ids = file.unique("categories", entries, "id", _IDS)
    names = file.unique("categories", entries, "name", frozenset({str}))
    if use.classes is None:
        return set(ids)
    if isinstance(use.classes, str):
        raise QsdError(f"metainfo.classes={use.classes!r} is one text; give a tuple of names: ({use.classes!r},).")
    twice = [name for i, name in enumerate(use.classes) if name in list(use.classes)[:i]]
    if twice:
        raise QsdError(f"metainfo.classes names {twice[0]!r} twice; give each class once.")
    missing = [name for name in use.classes if name not in names]
    if missing:
        raise QsdError(
            f"{shown(file.path)} has no category {missing[0]!r} ({len(missing)} of {len(use.classes)} classes are "
            f"missing; it has {', '.join(sorted(map(shown, names))[:3]) or 'none'}, ...); set dataset.metainfo.classes "
            "to its names."
        )
    chosen = set(use.classes)
    order = [name for name in names if name in chosen]
    if order != list(use.classes):
        index = next(i for i, (a, b) in enumerate(zip(order, use.classes)) if a != b)
        raise QsdError(
            f"{shown(file.path)} lists its categories in another order than metainfo.classes: {shown(order[index])!r} "
            f"where {use.classes[index]!r} is number {index}, and OpenMMLab labels boxes in the file's order; list the "
            "classes in that order."
        )
    return {identity for identity, name in zip(ids, names) if name in chosen}


def _check_boxes(
    file: _File,
    annotations: list[dict[str, Any]],
    places: dict[Any, int],
    shapes: np.ndarray[Any, Any],
    categories: set[Any],
    counts: dict[str, int],
) -> tuple[list[int], list[int]]:
    """Indices of the annotations that make boxes or crowds, and of all those in images and classes that are read."""
    part = "annotations"
    file.unique(part, annotations, "id", _IDS)
    owners = file.column(part, annotations, "image_id", _IDS)
    kinds = file.column(part, annotations, "category_id", _IDS)
    for flag in ("iscrowd", "ignore"):  # OpenMMLab takes every text for true, "0" as well.
        if not {type(entry.get(flag)) for entry in annotations} <= _FLAGS:
            index = next(i for i, entry in enumerate(annotations) if type(entry.get(flag)) not in _FLAGS)
            raise file.error(part, index, annotations, f"has {flag}={shortened(annotations[index][flag])}; give 0 or 1")
    read = [
        i
        for i, (owner, kind, entry) in enumerate(zip(owners, kinds, annotations))
        if owner in places and kind in categories and not entry.get("ignore")
    ]
    counts["of other images or classes, or ignored"] = len(annotations) - len(read)
    if annotations and not any(owner in places for owner in owners):
        raise file.error(
            part, 0, annotations, f"has image_id={shortened(owners[0])}; no image has it, nor any other one"
        )
    entries, file.numbers = [annotations[i] for i in read], read
    values, area = _boxes_and_areas(file, entries)
    shape = shapes[[places[owners[i]] for i in read]].reshape(-1, 2)[:, ::-1]
    inner = np.minimum(values[:, :2] + values[:, 2:], shape) - np.maximum(values[:, :2], 0)
    empty = (values[:, 2:] < 1).any(1) | (area <= 0)
    outside = ~empty & (inner <= 0).any(1)
    crowd = np.array([bool(entry.get("iscrowd")) for entry in entries], bool)
    counts["of boxes without area"] = int(empty.sum())
    counts["of boxes outside their image"] = int(outside.sum())
    counts["of crowds"] = int((crowd & ~empty & ~outside).sum())
    file.numbers = None
    used = [read[i] for i in np.flatnonzero(~empty & ~outside)]
    counts["images without boxes"] = len(places) - len({owners[i] for i in used if not annotations[i].get("iscrowd")})
    return used, read


def _boxes_and_areas(file: _File, entries: list[dict[str, Any]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Boxes ``[N, 4]`` as x, y, width, height, and areas ``[N]``; a field that is no such number is refused."""
    part = "annotations"
    boxes = file.column(part, entries, "bbox", frozenset({list}))
    areas = file.column(part, entries, "area", NUMBERS)
    if set(map(len, boxes)) - {4} or set(map(type, chain.from_iterable(boxes))) - NUMBERS:
        index = next(i for i, b in enumerate(boxes) if len(b) != 4 or not all(type(n) in NUMBERS for n in b))
        raise file.error(
            part, index, entries, f"has bbox={shortened(boxes[index])}, where [x, y, width, height] belongs"
        )
    values = floats(boxes).reshape(-1, 4)
    bad = ~np.isfinite(values).all(1) | (values[:, 2:] < 0).any(1)
    if bad.any():
        index = int(bad.argmax())
        raise file.error(part, index, entries, f"has bbox={shortened(boxes[index])}, which is no box")
    area = floats(areas)
    if np.isnan(area).any():
        raise file.error(part, int(np.isnan(area).argmax()), entries, "has area=NaN")
    return values, area


def _check_masks(
    file: _File,
    annotations: list[dict[str, Any]],
    chosen: list[int],
    places: dict[Any, int],
    shapes: np.ndarray[Any, Any],
    progress: Progress,
) -> None:
    task = progress.add_task(file.path.name, total=len(chosen))
    for start in range(0, len(chosen), _CHUNK):
        indices = chosen[start : start + _CHUNK]
        outlines = [annotations[i].get("segmentation") for i in indices]
        polygons = [part for outline in outlines if type(outline) is list for part in outline]
        if not are_polygons(polygons) or not all(outline and type(outline) in (list, dict) for outline in outlines):
            index, problem = next(
                (i, problem)
                for i, outline in zip(indices, outlines)
                if (problem := polygon_problem(outline)) is not None
            )
            raise file.error("annotations", index, annotations, problem)
        for index, outline in zip(indices, outlines):
            if type(outline) is dict:
                height, width = shapes[places[annotations[index]["image_id"]]]
                if (problem := run_problem(outline, int(height), int(width))) is not None:
                    raise file.error("annotations", index, annotations, problem)
        progress.advance(task, len(indices))


def _report(path: Path, counts: dict[str, int]) -> None:
    passed = [f"{number} {kind}" for kind, number in counts.items() if number and kind not in ("images", "annotations")]
    rest = f"; not used as boxes: {', '.join(passed)}" if passed else ""
    logger.info("%s: %d images, %d annotations%s.", shown(path), counts["images"], counts["annotations"], rest)
