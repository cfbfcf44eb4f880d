"""The handwritten digits that scikit-learn ships.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from typing import Any, Literal

import numpy as np
from PIL import Image

SIZES: dict[Literal["train", "val", "test"], int] = {"train": 1197, "val": 200, "test": 400}
FULL_SCALE = 16  # The digits' grey levels are 0..16.


def read_digits(height: int, width: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All 1,797 digits, enlarged from 8 x 8 pixels, and their classes.

    Args:
        height: Height in pixels.
        width: Width in pixels.

    Returns:
        uint8 ``[1797, H, W]`` and int64 ``[1797]``.
    """
    # Here, because importing scikit-learn takes a second that other data should not cost.
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.stack([_enlarged(image, height, width) for image in digits.images]), digits.target


def _enlarged(image: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """Scale a digit, grey levels 0..16 ``[8, 8]``, to uint8 ``[H, W]``."""
    grey = Image.fromarray((image * (255 / FULL_SCALE)).astype(np.float32))
    return np.rint(np.asarray(grey.resize((width, height), Image.Resampling.BILINEAR))).astype(np.uint8)
