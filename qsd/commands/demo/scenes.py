"""Scenes of handwritten digits on photographs: a small, real data set for detection and segmentation, no download.

The digits and both photographs are those that scikit-learn ships; the digits are light, the photographs darkened.
Training, validation and test scenes share neither digits nor parts of a photograph. One folder serves both frameworks:

    images/{training,validation,test}/*.jpg
    annotations/instances_{training,validation,test}.json    boxes and masks, COCO's format
    annotations/{training,validation,test}/*.png             ADE20K's format: 1 is background, 2 to 11 are the digits
    crops/{train,val}/<digit>/*.jpg                          one digit in each, ImageNet's layout, for pretraining
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.progress import track
from sklearn.datasets import load_sample_images

from qsd.data import DigitsData
from qsd.data.base import Part
from qsd.errors import QsdError
from qsd.reading.digits import FULL_SCALE, load_digits

Array = npt.NDArray[Any]

SIDE = 160  # pixels of a scene
WINDOW = 48  # pixels of a crop
MARGIN = 1.25  # side of the square that is cut out for a crop, over the digit's longer side
DIGITS = (1, 4)  # fewest and most that a scene is given; some find no room
HEIGHTS = (28, 56)  # smallest and largest digit, in pixels
BRIGHTNESS = 0.5  # of the photographs
COLOURS = (150, 255)  # darkest and lightest red, green or blue of a digit


@dataclass(frozen=True)
class Split:
    """A part of the data.

    Attributes:
        name: The name in OpenMMLab's layouts.
        crops: The name in ImageNet's layout, or ``None`` for a part without crops.
        part: The part of `DigitsData` whose digits it takes.
        columns: The first and the last column of the photographs that it takes, as shares of their width.
    """

    name: str
    crops: str | None
    part: Part
    columns: tuple[float, float]


SPLITS = (
    Split("training", "train", "train", (0.0, 0.5)),
    Split("validation", "val", "val", (0.5, 0.75)),
    Split("test", None, "test", (0.75, 1.0)),
)


@dataclass
class Scene:
    """An image ``[H, W, 3]``, with a mask ``[H, W]`` and a label for each digit."""

    image: Array
    masks: list[Array]
    labels: list[int]


def compose(split: Split, count: int, seed: int) -> Iterator[Scene]:
    """Compose the scenes of a split, the same ones for the same seed.

    Args:
        split: The part of the data.
        count: The number of scenes.
        seed: The seed of all random choices.
    """
    random = np.random.default_rng([seed, [s.name for s in SPLITS].index(split.name)])
    photographs = [_columns(image, split.columns) for image in load_sample_images().images]
    digits = _digits(split.part)
    for _ in range(count):
        scene = Scene(_background(photographs[random.integers(len(photographs))], random), [], [])
        taken = np.zeros((SIDE, SIDE), bool)
        for _ in range(random.integers(DIGITS[0], DIGITS[1] + 1)):
            image, label = digits[random.integers(len(digits))]
            _place(scene, taken, image, label, random)
        yield scene


def _columns(image: Array, columns: tuple[float, float]) -> Array:
    start, end = (round(share * image.shape[1]) for share in columns)
    return image[:, start:end]


def _digits(part: Part) -> list[tuple[Array, int]]:
    """Grey levels 0 to 1, ``[8, 8]``, and label of each digit of a part: the parts are those of `DigitsData`."""
    chosen = DigitsData(img_size=8).load_part(part)
    images = load_digits()[0] / FULL_SCALE
    numbers = [int(chosen.name(i).removeprefix("digit ")) for i in range(len(chosen))]
    return [(images[number], int(label)) for number, label in zip(numbers, chosen.labels)]


def _background(photograph: Array, random: np.random.Generator) -> Array:
    side = random.integers(SIDE // 2, SIDE + 1)
    top, left = (random.integers(length - side + 1) for length in photograph.shape[:2])
    crop = Image.fromarray(photograph[top : top + side, left : left + side])
    pixels = BRIGHTNESS * np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    return pixels[:, ::-1] if random.random() < 0.5 else pixels


def _place(scene: Scene, taken: Array, digit: Array, label: int, random: np.random.Generator) -> None:
    """Paint a digit on a free place, or none if there is no room."""
    size = int(random.integers(HEIGHTS[0], HEIGHTS[1] + 1))
    grey = Image.fromarray((255 * digit).astype(np.uint8))
    grey = grey.resize((size, size), Image.Resampling.BICUBIC)
    grey = grey.rotate(random.uniform(-10, 10), Image.Resampling.BICUBIC)
    alpha = np.clip(np.asarray(grey, np.float32) / 255, 0, 1)
    for _ in range(20):
        top, left = random.integers(0, SIDE - size + 1, 2)
        place = (slice(top, top + size), slice(left, left + size))
        if not taken[place].any():
            break
    else:
        return
    taken[place] = True
    weight = alpha[..., None]
    scene.image[place] = scene.image[place] * (1 - weight) + random.uniform(*COLOURS, 3) * weight
    mask = np.zeros((SIDE, SIDE), bool)
    mask[place] = alpha > 0.5
    scene.masks.append(mask)
    scene.labels.append(label)


def run_lengths(mask: Array) -> list[int]:
    """COCO's uncompressed run-length encoding: lengths of zeros and ones in turn, down the columns.

    Args:
        mask: The mask ``[H, W]``.
    """
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *lengths] if flat[0] else lengths


def annotation(mask: Array, label: int, image: int, number: int) -> dict[str, Any]:
    """COCO's entry for one digit; the box encloses the mask.

    Args:
        mask: The mask ``[H, W]``.
        label: The digit.
        image: The number of the image.
        number: The number of the entry.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    return {
        "id": number,
        "image_id": image,
        "category_id": label + 1,
        "bbox": [int(x) for x in box],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
    }


def write_split(folder: Path, split: Split, count: int, seed: int) -> None:
    """Write images, annotations and crops of a split.

    Args:
        folder: The folder of the data set.
        split: The part of the data.
        count: The number of scenes.
        seed: The seed of all random choices.
    """
    images, maps = folder / "images" / split.name, folder / "annotations" / split.name
    for path in (images, maps):
        path.mkdir(parents=True)
    coco: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    coco["categories"] = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    scenes = compose(split, count, seed)
    for number, scene in enumerate(track(scenes, f"{split.name} scenes", total=count), start=1):
        name = f"{number:05d}.jpg"
        pixels = np.clip(np.rint(scene.image), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(images / name, quality=95)
        classes = np.ones((SIDE, SIDE), np.uint8)
        for mask, label in zip(scene.masks, scene.labels):
            classes[mask] = label + 2
            coco["annotations"].append(annotation(mask, label, number, len(coco["annotations"]) + 1))
            if split.crops is not None:
                target = folder / "crops" / split.crops / str(label)
                target.mkdir(parents=True, exist_ok=True)
                _window(pixels, mask).save(target / f"{number:05d}_{len(coco['annotations'])}.jpg", quality=95)
        Image.fromarray(classes).save(maps / f"{number:05d}.png")
        coco["images"].append({"id": number, "file_name": name, "height": SIDE, "width": SIDE})
    (folder / "annotations" / f"instances_{split.name}.json").write_text(json.dumps(coco))


def _window(pixels: Array, mask: Array) -> Image.Image:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    side = min(SIDE, round(MARGIN * max(np.ptp(rows) + 1, np.ptp(columns) + 1)))
    top, left = (int(np.clip((x[0] + x[-1] + 1 - side) // 2, 0, SIDE - side)) for x in (rows, columns))
    crop = Image.fromarray(pixels[top : top + side, left : left + side])
    return crop.resize((WINDOW, WINDOW), Image.Resampling.BILINEAR)


def make_scenes(folder: Path, counts: Sequence[int] = (2000, 200, 400), seed: int = 0) -> None:
    """Write the whole data set, or nothing.

    Args:
        folder: The folder to write; it must not exist.
        counts: The numbers of scenes for training, validation and test.
        seed: The seed of all random choices.

    Raises:
        QsdError: If the folder exists, or a count is not positive.
    """
    if folder.exists():
        raise QsdError(f"{folder} exists; remove it first, or use it as it is.")
    if min(counts) < 1:
        raise QsdError(f"scenes {tuple(counts)}: each part needs at least one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for split, count in zip(SPLITS, counts):
            write_split(partial, split, count, seed)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
