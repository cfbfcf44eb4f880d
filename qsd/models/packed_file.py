"""The format of packed files: low-bit integers and other tensors in safetensors.

Integers are written as one stream with their own number of bits each (3 bits take 3 bits), deflated where that is
smaller; all other tensors keep their type. The metadata has one entry, ``qsd``: the header as JSON, see
`qsd.models.packed_header`. Reading checks header and sizes before it allocates memory for them.
"""

import json
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
from qsd.files import replacing
from qsd.layers.renamed import former_name
from qsd.models.packed_header import PackedHeader, PackedTensor, read_header

KEY = "qsd"
MERGED = "merged/"  # in front of the names of merged kernels
# Compressed integers may grow by this factor in all, if they grow beyond 64 MiB. Weights of a trained network hardly
# shrink, whereas a file that was made to exhaust the memory grows a thousandfold.
_MOST_GROWTH, _SMALL = 128, 2**26
# What damaged bytes lead to in safetensors, zlib, NumPy and PyTorch.
_DAMAGE = (SafetensorError, zlib.error, OSError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def write_packed(
    path: str | Path,
    header: PackedHeader,
    tensors: Mapping[str, Tensor],
    integers: Mapping[str, tuple[Tensor, int]],
) -> None:
    """Write a packed file; one that exists is replaced when the new one is complete.

    Args:
        path: The file.
        header: Everything beside the tensors.
        tensors: Tensors by name, on the CPU.
        integers: Signed integers by name, with their number of bits, up to 16.

    Raises:
        QsdError: If the file cannot be written or the notes are no JSON.
    """
    packed, streams = {}, {}
    for name, (values, bits) in integers.items():
        streams[name], deflated = _pack(values, bits)
        packed[name] = PackedTensor(bits=bits, shape=list(values.shape), deflated=deflated)
    try:
        text = json.dumps(header.model_copy(update={"packed": packed}).model_dump())
    except (TypeError, ValueError) as error:
        raise QsdError(f"notes that are stored in a file must be JSON, and these are no JSON: {error}.") from error
    with replacing(path) as partial:
        try:
            named = {former_name(name): tensor for name, tensor in tensors.items()}
            safetensors.torch.save_file({**named, **streams}, partial, {KEY: text})
        except SafetensorError as error:
            raise OSError(error) from error


def read_packed(path: str | Path) -> tuple[PackedHeader, dict[str, Tensor]]:
    """Header and tensors of a packed file; low-bit integers are int8, or int16 beyond 8 bits.

    Args:
        path: The file.

    Raises:
        QsdError: If it is missing, damaged, no packed file, or of a newer version; and if a tensor is larger than its
            data.
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
            header = read_header(metadata[KEY], str(path))
            _check_sizes(file, header)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        for name, entry in header.packed.items():
            tensors[name] = _unpack(tensors[name], entry)
    except QsdError:
        raise
    except _DAMAGE as error:
        raise QsdError(f"packed file {path} cannot be read: it is damaged, incomplete or no packed file.") from error
    return header, tensors


def _check_sizes(file: Any, header: PackedHeader) -> None:
    """Compare the sizes that the header claims with the stored ones, before anything is read.

    Raises:
        ValueError: If one cannot be.
    """
    stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    unknown = [name for name, data in stored.items() if data.get_dtype() not in _TYPES]
    if unknown:
        raise ValueError(f"{unknown[0]} is of an unknown type")
    stored_bytes = claimed_bytes = 0
    for name, entry in header.packed.items():
        if name not in stored or stored[name].get_dtype() != "U8" or len(stored[name].get_shape()) != 1:
            raise ValueError(f"{name} is no stream of bytes")
        (size,) = stored[name].get_shape()
        if not entry.deflated and size != entry.stream_bytes:
            raise ValueError(f"{name} has {size} bytes for {entry.count} integers of {entry.bits} bits")
        stored_bytes += size
        claimed_bytes += entry.stream_bytes
    if claimed_bytes > max(_MOST_GROWTH * stored_bytes, _SMALL):
        raise ValueError(f"{stored_bytes} bytes would grow to {claimed_bytes}")


def _pack(integers: Tensor, bits: int) -> tuple[Tensor, bool]:
    """The lowest bits of integers as one stream of bytes, and whether it is deflated."""
    lowest = integers.numpy().astype(np.uint16).reshape(-1, 1) >> np.arange(bits, dtype=np.uint16) & 1
    stream = np.packbits(lowest.astype(np.uint8), bitorder="little").tobytes()
    deflated = zlib.compress(stream, 9)
    smaller = len(deflated) < len(stream)
    data = np.frombuffer(deflated if smaller else stream, np.uint8)
    return torch.from_numpy(data.copy()), smaller


def _unpack(data: Tensor, entry: PackedTensor) -> Tensor:
    """Integers in two's complement, int8 or beyond 8 bits int16.

    Raises:
        ValueError: If the stream is longer or shorter than the shape needs.
    """
    stream = data.numpy().tobytes()
    if entry.deflated:
        # One byte more than needed shows a stream that is too long, without expanding the rest of it.
        stream = zlib.decompressobj().decompress(stream, entry.stream_bytes + 1)
    if len(stream) != entry.stream_bytes:
        raise ValueError(f"{len(stream)} bytes for {entry.count} integers of {entry.bits} bits")
    packed = np.frombuffer(stream, np.uint8)
    digits = np.unpackbits(packed, count=entry.count * entry.bits, bitorder="little").reshape(-1, entry.bits)
    values = np.zeros(entry.count, np.int32)
    for place in range(entry.bits):
        values |= digits[:, place].astype(np.int32) << place
    values -= (values >> (entry.bits - 1)) << entry.bits  # the highest bit is the sign
    return torch.from_numpy(values.astype(np.int8 if entry.bits <= 8 else np.int16).reshape(entry.shape))
