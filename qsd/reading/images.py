"""From an image file to 8-bit RGB; a broken file becomes a value, not an exception.

A ``DataLoader`` worker that raises hands the main process a many-line traceback as the message. A `BadImage` instead
travels with the batch, and the main process decides what to do about it.
"""

import io
import os
import stat
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, UnidentifiedImageError

from qsd.errors import QsdError

__all__ = [
    "BadImage",
    "ExifOrientation",
    "check_orientation",
    "decode_image",
    "image_endings",
    "load_image",
    "upright",
]

ExifOrientation = Literal["upright", "ignore"]
"""Turn images as their EXIF orientation asks, or leave them as their pixels are stored."""

# Pillow's names of the formats that are read, with the endings of their files. Pillow knows forty more, among them ones
# that start other programs (PostScript runs Ghostscript) and ones that hardly anybody has tested with broken files.
_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
}
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(NamedTuple):
    """A file that could not be decoded.

    Attributes:
        path: The file.
        reason: The reason, in one line.
    """

    path: str
    reason: str


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # AVIF and WebP are not in every Pillow


@cache
def image_endings() -> tuple[str, ...]:
    """The endings of file names, in lower case, that are taken for images."""
    return tuple(ending for name in _formats() for ending in _FORMATS[name])


def check_orientation(exif_orientation: str) -> None:
    """Refuse an unknown rule for the EXIF orientation.

    Args:
        exif_orientation: Name of the rule.

    Raises:
        QsdError: If it is neither "upright" nor "ignore".
    """
    if exif_orientation not in get_args(ExifOrientation):
        raise QsdError(f"exif_orientation={exif_orientation!r} is unknown; choose 'upright' or 'ignore'.")


def load_image(path: str, exif_orientation: ExifOrientation = "upright") -> Image.Image | BadImage:
    """Decode an image file completely.

    Grey, palette, CMYK and two-level images become RGB. An alpha channel and transparent colours are dropped without
    compositing, as torchvision and timm do. 16-bit grey is divided by 256 (Pillow alone would clip at 255); a grey
    image of 32-bit integers is taken as 16-bit or 8-bit by its range, one of floats as 0..1 or 0..255. Of an
    animation, the first frame is taken.

    Args:
        path: The file.
        exif_orientation: ``"upright"`` turns photographs as their camera was held, as OpenMMLab does; ``"ignore"``
            leaves them as stored, as torchvision's loader does. Pillow itself turns TIFF images in both cases.

    Returns:
        The RGB image with 8 bits per channel, or the reason why there is none.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return BadImage(path, "it is a folder, pipe, socket or device, no file")
        if status.st_size == 0:
            return BadImage(path, "the file is empty")
    except OSError as error:
        return BadImage(path, _reason(error, path))
    return _decode(path, path, exif_orientation)


def decode_image(content: bytes, name: str, exif_orientation: ExifOrientation = "upright") -> Image.Image | BadImage:
    """Decode the content of an image file, as `load_image` does.

    Args:
        content: The bytes of the file.
        name: Name of the image, for messages.
        exif_orientation: As for `load_image`.

    Returns:
        The RGB image with 8 bits per channel, or the reason why there is none.
    """
    return _decode(io.BytesIO(content), name, exif_orientation) if content else BadImage(name, "the image is empty")


def _decode(file: str | io.BytesIO, name: str, exif_orientation: ExifOrientation) -> Image.Image | BadImage:
    try:
        with Image.open(file, formats=_formats()) as image:
            image.load()  # `open` reads the header alone: a truncated file shows here
            return _to_rgb(upright(image) if exif_orientation == "upright" else image)
    except MemoryError:
        raise  # which is not the file's fault
    except UnidentifiedImageError:
        return BadImage(name, "it is no image of a known format")
    except Exception as error:  # whatever a decoder stumbles over: Pillow lists no types
        return BadImage(name, _reason(error, name))


def _reason(error: Exception, name: str) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200].replace(repr(name), "the file")


def upright(image: Image.Image) -> Image.Image:
    """Turn and mirror an image as its EXIF orientation asks; damaged EXIF data are passed over.

    Args:
        image: An image as Pillow has opened it.
    """
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the pixels are good whatever the EXIF data are
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB warns; the colours are the same
    elif image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_uint8(np.asarray(image), image.mode, image.format))
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy an image that is RGB already


def _to_uint8(values: np.ndarray[Any, Any], mode: str, file_format: str | None) -> np.ndarray[Any, Any]:
    """Scale grey values ``[H, W]`` of any depth to 0..255.

    Args:
        values: Integers or floats.
        mode: Pillow's name of the pixel format.
        file_format: Pillow's name of the file format.

    Returns:
        uint8 ``[H, W]``.
    """
    low, high = values.min(), values.max()
    if mode == "F":
        if not (low >= 0 and high <= 255):  # NaN fails this too
            raise ValueError(f"float grey values from {low:g} to {high:g}; expected 0 to 1 or 0 to 255")
        return np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"grey values from {low} to {high}; expected 0 to 65535")
    # Pillow opens a 16-bit PGM (and, in old releases, PNG) as 32-bit integers: there the range is known
    sixteen_bit = mode != "I" or file_format in ("PPM", "PNG") or high > 255
    return (values // 256 if sixteen_bit else values).astype(np.uint8)
