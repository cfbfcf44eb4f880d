"""Label maps of segmentation, all of them looked at before a training reads them."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from qsd.errors import QsdError
from qsd.reading.files import shown
from qsd.reading.images import upright

_MANY = 500  # maps, from which on a progress bar is shown
_FORMATS = ("PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG")
_IMAGES = (*_FORMATS, "AVIF", "JPEG2000")  # OpenCV reads these, too, and no program is started for any of them
_GREY = ("L", "P", "1")  # Pillow's names of images that hold one small number by pixel
_DEEP = ("I", "I;16", "I;16B", "I;16L")  # the same with larger numbers


def check_maps(dataset: Any, classes: int, indices: Sequence[int], ignore: int = 255) -> None:
    """Look into label maps, whose mistakes an index error deep in the loss would otherwise show.

    Args:
        dataset: A data set of mmseg.
        classes: Number of classes.
        indices: The images whose maps are looked at.
        ignore: Label of pixels that do not count.

    Raises:
        QsdError: With the first map that is missing, cannot be read, holds colours, a label beyond the classes, or has
            another size than its image.
    """
    legal = _legal_labels(dataset, classes, ignore)

    def look(index: int) -> str | None:
        info = dataset.get_data_info(index)
        return _problem(info["img_path"], info.get("seg_map_path"), legal, classes)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found: Iterable[str | None] = pool.map(look, indices)
        if len(indices) >= _MANY:
            found = track(found, "label maps", total=len(indices), transient=True)
        problem = next((problem for problem in found if problem is not None), None)
        if problem is not None:
            pool.shutdown(wait=False, cancel_futures=True)
            raise QsdError(problem)


def _legal_labels(dataset: Any, classes: int, ignore: int) -> np.ndarray[Any, Any]:
    """Which of the numbers 0 to 255 mmseg turns into a class or into the label of pixels that do not count."""
    labels: np.ndarray[Any, Any] = np.arange(256)
    if dataset.reduce_zero_label:
        labels = np.where(labels == 0, 255, labels) - 1
        labels[labels == 254] = 255
    final = labels.copy()
    for old, new in (dataset.label_map or {}).items():
        final[labels == old] = new
    return ((final >= 0) & (final < classes)) | (final == ignore)


def _problem(image: str, path: str | None, legal: np.ndarray[Any, Any], classes: int) -> str | None:
    if path is None:
        return f"{shown(image)} has no label map: the data set has no data_prefix.seg_map_path; set it."
    try:
        if not os.path.isfile(path):
            return f"label map {shown(path)} does not exist, or is no file."
        with Image.open(path, formats=_FORMATS) as opened:
            if opened.mode not in (*_GREY, *_DEEP):
                return (
                    f"{shown(path)} is a colour image ({opened.mode}); label maps hold one number by pixel: convert it."
                )
            labels = np.asarray(opened)
    except Exception as error:  # whatever a decoder stumbles over
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"label map {shown(path)} cannot be read: {reason}."
    present = np.flatnonzero(np.bincount(labels.ravel())) if labels.size and labels.min() >= 0 else np.array([-1])
    wrong = [int(label) for label in present if not 0 <= label < 256 or not legal[label]]
    if wrong:
        return f"{shown(path)} holds the label {wrong[0]}, beyond the {classes} classes of the data set."
    return _size_problem(image, path, labels.shape[::-1])


@cache
def _image_formats() -> list[str]:
    Image.init()
    return [name for name in _IMAGES if name in Image.OPEN]


def _size_problem(image: str, path: str, size: tuple[int, ...]) -> str | None:
    try:
        if not os.path.isfile(image):  # opening a pipe would wait for ever
            return f"image {shown(image)} does not exist, or is no file."
        with Image.open(
            image, formats=_image_formats()
        ) as opened:  # its header alone; the image itself is decoded in training
            found = opened.size
            if found != size:
                found = upright(opened).size
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"image {shown(image)} cannot be read: {reason}."
    if found != size:
        sizes = f"is {size[0]}x{size[1]} pixels, its image {found[0]}x{found[1]}"
        return f"label map {shown(path)} {sizes}; they must be equal."
    return None
