"""The format of packed files: low-bit integers and other tensors in safetensors.

Integers are written as one stream of as many bits each as they have (3 bits take 3 bits), deflated where that is
smaller; all other tensors keep their own type. The metadata has one entry, ``qsd``: the version and a header, as JSON.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qsd.errors import QsdError

KEY, VERSION = "qsd", 1
MERGED = "merged/"  # in front of the names of merged kernels


def write_packed(
    path: str | Path,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    integers: Mapping[str, tuple[Tensor, int]],
) -> None:
    """Write a packed file; one that exists is replaced when the new one is complete.

    Args:
        path: of the file.
        header: further facts, as JSON.
        tensors: by name, on the CPU.
        integers: signed ones by name, with the number of bits they have, up to 16.

    Raises:
        QsdError: if the file cannot be written or the header is no JSON.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise QsdError(f"the folder {path.parent} does not exist; make it first.")
    packed, streams = {}, {}
    for name, (values, bits) in integers.items():
        streams[name], deflated = _pack(values, bits)
        packed[name] = {"bits": bits, "shape": list(values.shape), "deflated": deflated}
    try:
        text = json.dumps({"version": VERSION, **header, "packed": packed})
    except (TypeError, ValueError) as error:
        raise QsdError(f"what is to be kept beside the weights is no JSON: {error}.") from error
    partial = path.with_name(f"{path.name}.part")
    try:
        safetensors.torch.save_file({**tensors, **streams}, partial, {KEY: text})
        os.umask(umask := os.umask(0))
        partial.chmod(0o666 & ~umask)  # safetensors writes files that only their owner can read
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise QsdError(f"{path} cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def read_packed(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a packed file; integers come as int8 (int16 beyond 8 bits).

    Args:
        path: of the file.

    Raises:
        QsdError: if it is missing, damaged, no packed file, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise QsdError(f"packed file {path} does not exist." if not path.exists() else f"{path} is no file.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise QsdError(
                    f"{path} was not written by qsd.save_packed; bare weights: qsd.load_weights(model, path)."
                )
            header = json.loads(metadata[KEY])
            if header["version"] > VERSION:
                raise QsdError(
                    f"{path} has version {header['version']} of the format; this qsd reads {VERSION}: update it."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        for name, entry in header["packed"].items():
            tensors[name] = _unpack(tensors[name], **entry)
    except QsdError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise QsdError(f"packed file {path} cannot be read: it is damaged, incomplete or no packed file.") from error
    return header, tensors


def _pack(integers: Tensor, bits: int) -> tuple[Tensor, bool]:
    """The lowest bits of integers as one stream of bytes, and whether it is deflated."""
    lowest = integers.numpy().astype(np.uint16).reshape(-1, 1) >> np.arange(bits, dtype=np.uint16) & 1
    stream = np.packbits(lowest.astype(np.uint8), bitorder="little").tobytes()
    deflated = zlib.compress(stream, 9)
    smaller = len(deflated) < len(stream)
    data = np.frombuffer(deflated if smaller else stream, np.uint8)
    return torch.from_numpy(data.copy()), smaller


def _unpack(data: Tensor, bits: int, shape: list[int], deflated: bool) -> Tensor:
    """Two's complement integers of so many bits, int8 (int16 beyond 8 bits)."""
    stream = data.numpy().tobytes()
    stream = zlib.decompress(stream) if deflated else stream
    count = math.prod(shape)
    if len(stream) != math.ceil(count * bits / 8):
        raise ValueError(f"{len(stream)} bytes for {count} integers of {bits} bits")
    single = np.unpackbits(np.frombuffer(stream, np.uint8), count=count * bits, bitorder="little").reshape(-1, bits)
    unsigned = (single.astype(np.int32) << np.arange(bits, dtype=np.int32)).sum(axis=1)
    signed = unsigned - ((unsigned >> (bits - 1)) << bits)
    return torch.from_numpy(signed.astype(np.int8 if bits <= 8 else np.int16).reshape(shape))
