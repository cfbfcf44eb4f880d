"""Reading IDX files, the format of MNIST and of the data sets that follow it, plain or gzipped."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from qsd.reading.files import FileError, regular_file

_MOST_BYTES = 1 << 30  # of one file, unpacked; the largest data set of this format has 0.6 GB
_BYTES = 0x08  # type of the values in the third byte of the file: unsigned bytes


def read_idx(path: str | Path, dimensions: int) -> np.ndarray[Any, Any]:
    """Read an array of unsigned bytes.

    LeCun, Cortes, Burges, "The MNIST database of handwritten digits": two zero bytes, the type, the number of
    dimensions, the sizes as 32-bit integers of high byte first, and the values.

    Args:
        path: The file; it is gzipped if its name ends with ``.gz``.
        dimensions: Number of dimensions that the array must have: 3 for images, 1 for labels.

    Returns:
        uint8, ``[N, H, W]`` or ``[N]``.

    Raises:
        FileError: If the file is missing, damaged, or of another format or number of dimensions.
    """
    path = regular_file(path, "IDX file")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"IDX file {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, _BYTES, dimensions)) or len(content) < start:
        raise FileError(f"{path} is no IDX file of bytes with {dimensions} dimension(s); use another copy of it.")
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise FileError(f"IDX file {path} is damaged: it has {len(content) - start} values for the sizes {shape}.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
