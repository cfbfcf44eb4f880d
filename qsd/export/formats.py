"""The file formats for converted networks, one row each. A new format is one module with a function, and one row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qsd.errors import QsdError
from qsd.export.c_program import write_c
from qsd.export.integer_dump import write_integers
from qsd.export.nir import to_nir
from qsd.export.onnx import to_onnx
from qsd.export.qonnx import write_qonnx
from qsd.integer import IntegerNetwork, to_integer
from qsd.packing import save_packed
from qsd.spiking import SpikingNetwork
from qsd.spiking.batches import Images, image_batches
from qsd.spiking.merging import Merge


@dataclass(frozen=True)
class ExportOptions:
    """Options of all formats. A format that has no use for one of them ignores it.

    Attributes:
        images: Images ``[B, C, H, W]``, or a data loader, on which value ranges are measured.
        notes: Facts to store in the file, as JSON, such as class names and normalisation.
        round_inner: Chains of convolutions whose inner values become integers, see `to_onnx`.
        fractional_bits: Bits behind the point of running sums in integer networks, see `qsd.to_integer`.
        inner_bits: Largest width of values between the convolutions of a chain, see `qsd.to_integer`.
        vectors: Number of images whose spikes are test vectors.
        compact: Whether integer ONNX files hold weights as words of a dictionary, see `to_onnx`.
    """

    images: Images | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    round_inner: Merge = "all"
    fractional_bits: int | None = None
    inner_bits: int = 24
    vectors: int = 4
    compact: bool = False


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        ending: End of the file's name, or of the folder's name, with its dot.
        write: Function that writes a network to a path.
        description: Content of the file in a few words.
        use: Command or file that runs a written file, with ``{path}`` for its path.
        parts: Whether the format holds single modules of a network, such as its stem. Nothing is measured for them.
        exact: Whether a network should be converted in float64, because its integers are compared with it.
    """

    ending: str
    write: Callable[[SpikingNetwork, Path, ExportOptions], object]
    description: str
    use: str = "qsd run IMAGE --model {path}"
    parts: bool = False
    exact: bool = False


def _write_onnx(spiking: SpikingNetwork, path: Path, options: ExportOptions) -> None:
    to_onnx(spiking, path, images=options.images, notes=options.notes)


def _write_integer_onnx(spiking: SpikingNetwork, path: Path, options: ExportOptions) -> None:
    to_onnx(spiking, path, True, options.images, options.notes, options.round_inner, False, options.compact)


def _write_standard_onnx(spiking: SpikingNetwork, path: Path, options: ExportOptions) -> None:
    to_onnx(spiking, path, True, options.images, options.notes, options.round_inner, True, options.compact)


def _write_packed(spiking: SpikingNetwork, path: Path, options: ExportOptions) -> None:
    save_packed(spiking, path, options.notes)


def _write_nir(spiking: SpikingNetwork, path: Path, options: ExportOptions) -> None:
    to_nir(spiking, path, notes=options.notes)


def _integer_network(spiking: SpikingNetwork, options: ExportOptions) -> IntegerNetwork:
    """The integer network, whose bytes are those of the image files if the normalisation is among the notes."""
    if options.images is None:
        raise QsdError("an integer network needs images, for their size and to search its widths; pass images=...")
    mean, std = (options.notes.get(key) for key in ("mean", "std"))
    return to_integer(spiking, options.images, options.fractional_bits, options.inner_bits, mean, std)


def _write_integers(spiking: SpikingNetwork, path: Path, options: ExportOptions) -> None:
    network = _integer_network(spiking, options)
    assert options.images is not None
    batches = [batch for batch, _ in image_batches(options.images, spiking, options.vectors)] if options.vectors else []
    pixels = [network.pixels(batch) for batch in batches]
    write_integers(network, path, np.concatenate(pixels) if pixels else None, options.notes)


def _write_c(spiking: SpikingNetwork, path: Path, options: ExportOptions) -> None:
    write_c(_integer_network(spiking, options), path)


def _write_qonnx(spiking: SpikingNetwork, path: Path, options: ExportOptions) -> None:
    write_qonnx(_integer_network(spiking, options), path)


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", _write_onnx, "ONNX with floats"),
    "onnx-int8": Format(".int8.onnx", _write_integer_onnx, "ONNX with integer convolutions on spike counts"),
    "onnx-standard": Format(".standard.onnx", _write_standard_onnx, "the same with operations of the standard alone"),
    "packed": Format(".packed.safetensors", _write_packed, "packed weights of few bits, for qsd itself"),
    "integers": Format(
        ".integers",
        _write_integers,
        "integers for hardware, with test vectors",
        "python docs/read_integers.py {path}",
        exact=True,
    ),
    "c": Format(".c", _write_c, "integers as one C99 file", "cc -std=c99 -O2 {path}", exact=True),
    "qonnx": Format(
        ".qonnx.onnx", _write_qonnx, "QONNX of a network without attention", "FINN or hls4ml: {path}", exact=True
    ),
    "nir": Format(".nir", _write_nir, "NIR graph of a part without attention", "the schedule {path}.json", parts=True),
}
