"""From an image file to 8-bit RGB, whatever the file holds; a broken file becomes a value, not an exception.

A ``DataLoader`` worker that raises hands the main process a many-line traceback as the message. A `BadImage` instead
travels with the batch, and the main process decides what to do about it.
"""

import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# What Pillow's decoders raise on broken bytes. Not `Exception`: running out of memory is not the file's fault.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BadImage(NamedTuple):
    """A file that could not be decoded.

    Attributes:
        path: The file.
        reason: Why, in one line.
    """

    path: str
    reason: str


def load_image(path: str) -> Image.Image | BadImage:
    """Decode an image file completely.

    Grey, palette, CMYK and two-level images become RGB. An alpha channel and transparent colours are dropped without
    compositing, as torchvision and timm do. 16-bit grey is divided by 256 (Pillow alone would clip at 255); a grey
    image of 32-bit integers is taken as 16-bit or 8-bit by its range, one of floats as 0..1 or 0..255. EXIF
    orientation is ignored, as in the published ImageNet recipes. Of an animation, the first frame is taken.

    Args:
        path: The file.

    Returns:
        The RGB image with 8 bits per channel, or why there is none.
    """
    try:
        with Image.open(path) as image:
            image.load()  # `open` reads the header alone: a truncated file shows here.
            return _to_rgb(image)
    except _DECODING_ERRORS as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return BadImage(path, lines[0])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Straight to RGB warns; the colours are the same.
    elif image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_uint8(np.asarray(image), image.mode, image.format))
    return image.convert("RGB")


def _to_uint8(values: np.ndarray[Any, Any], mode: str, file_format: str | None) -> np.ndarray[Any, Any]:
    """Scale grey values ``[H, W]`` of any depth to uint8, 0..255."""
    low, high = values.min(), values.max()
    if mode == "F":
        if not (low >= 0 and high <= 255):  # NaN fails this too.
            raise ValueError(f"float grey values from {low:g} to {high:g}; expected 0 to 1 or 0 to 255")
        return np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"grey values from {low} to {high}; expected 0 to 65535")
    # Pillow opens a 16-bit PGM (and, in old releases, PNG) as 32-bit integers: there the range is known.
    sixteen_bit = mode != "I" or file_format in ("PPM", "PNG") or high > 255
    return (values // 256 if sixteen_bit else values).astype(np.uint8)
