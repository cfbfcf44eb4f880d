"""Outlines of objects in annotation files: polygons and run lengths, and the words for what is wrong with them."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from qsd.reading.files import shown

NUMBERS = frozenset({int, float})
_POINTS = 6  # Numbers of the smallest polygon, a triangle.


def are_polygons(polygons: list[Any]) -> bool:
    """Whether entries are lists of finite numbers, an even number of them and enough for a triangle.

    Args:
        polygons: Entries of an annotation file.
    """
    if set(map(type, polygons)) - {list}:
        return False
    lengths = set(map(len, polygons))
    if any(length < _POINTS or length % 2 for length in lengths):
        return False
    numbers = list(chain.from_iterable(polygons))
    return set(map(type, numbers)) <= NUMBERS and bool(np.isfinite(floats(numbers)).all())


def floats(numbers: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Numbers, or rows of them, as floats; whole numbers beyond their range are infinite.

    Args:
        numbers: Numbers of an annotation file.
    """
    try:
        return np.array(numbers, float)
    except OverflowError:
        return np.vectorize(lambda number: math.inf if abs(number) > 1e300 else float(number), otypes=[float])(
            np.array(numbers, object)
        )


def polygon_problem(outline: Any) -> str | None:
    """The reason why an outline is no list of polygons, in words; run lengths pass.

    Args:
        outline: The field ``segmentation`` of an annotation.
    """
    if type(outline) is dict:
        return None if outline else "has an empty segmentation"
    if type(outline) is not list:
        return "has no field 'segmentation'" if outline is None else f"has segmentation={shortened(outline)}"
    if not outline:
        return "has an empty segmentation"
    for polygon in outline:
        if type(polygon) is not list or not all(type(number) in NUMBERS for number in polygon):
            return f"has a polygon that is no list of numbers: {shortened(polygon)}"
        if len(polygon) < _POINTS or len(polygon) % 2:
            return f"has a polygon of {len(polygon)} numbers; at least {_POINTS}, and an even number, make one"
        if not np.isfinite(floats(polygon)).all():
            return "has a polygon with coordinates that are not finite"
    return None


def run_problem(outline: dict[str, Any], height: int, width: int) -> str | None:
    """The reason why run lengths do not describe a mask of an image, in words.

    Args:
        outline: Run lengths as COCO stores them, compressed or not.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """
    size, counts = outline.get("size"), outline.get("counts")
    if size != [height, width]:
        return f"has run lengths of the size {shortened(size)} in an image of [{height}, {width}]"
    if isinstance(counts, str):
        runs = _runs_of(counts)
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        runs = counts
    else:
        return f"has run lengths counts={shortened(counts)}, where a list of whole numbers or a text belongs"
    if runs is None or any(run < 0 for run in runs) or sum(runs) != height * width:
        found = "cannot be decoded" if runs is None else f"cover {sum(runs)} pixels"
        return f"has run lengths that {found}, in an image of {height * width}"
    return None


def _runs_of(text: str) -> list[int] | None:
    """Decode COCO's compressed run lengths: five bits a character, and differences to the run before last."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def shortened(value: Any) -> str:
    """A value of a file, short enough for a message.

    Args:
        value: Any value.
    """
    return shown(repr(value) if not isinstance(value, float) else f"{value:g}")[:60]
