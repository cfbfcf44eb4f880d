"""The handwritten digits that scikit-learn ships.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

SIZES: dict[Literal["train", "val", "test"], int] = {"train": 1197, "val": 200, "test": 400}
FULL_SCALE = 16  # The digits' grey levels are 0..16.


def load_digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All 1,797 digits as they are shipped, without importing scikit-learn, which takes more than a second.

    Returns:
        Grey levels 0 to 16, float64 ``[1797, 8, 8]``, and classes, int64 ``[1797]``.
    """
    package = find_spec("sklearn")
    folder = package.submodule_search_locations[0] if package and package.submodule_search_locations else ""
    file = Path(folder, "datasets", "data", "digits.csv.gz")
    if not file.is_file():  # scikit-learn keeps it elsewhere, or is not installed and says so
        from sklearn import datasets

        digits = datasets.load_digits()
        return digits.images, digits.target
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def read_digits(height: int, width: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All 1,797 digits, enlarged from 8 x 8 pixels, and their classes.

    Args:
        height: Height in pixels.
        width: Width in pixels.

    Returns:
        uint8 ``[1797, H, W]`` and int64 ``[1797]``.
    """
    images, classes = load_digits()
    return np.stack([_enlarged(image, height, width) for image in images]), classes


def _enlarged(image: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """Scale a digit, grey levels 0..16 ``[8, 8]``, to uint8 ``[H, W]``."""
    grey = Image.fromarray((image * (255 / FULL_SCALE)).astype(np.float32))
    return np.rint(np.asarray(grey.resize((width, height), Image.Resampling.BILINEAR))).astype(np.uint8)
