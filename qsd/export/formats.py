"""The file formats for converted networks, one row each. A new format is one module with a function, and one row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsd.export.nir import to_nir
from qsd.export.onnx import to_onnx
from qsd.packing import save_packed
from qsd.spiking import SpikingNetwork
from qsd.spiking.batches import Images
from qsd.spiking.merging import Merge


@dataclass(frozen=True)
class ExportOptions:
    """Options of all formats. A format that has no use for one of them ignores it.

    Attributes:
        images: Images ``[B, C, H, W]``, or a data loader, on which value ranges are measured.
        notes: Facts to store in the file, as JSON, such as class names and normalisation.
        round_inner: Chains of convolutions whose inner values become integers, see `to_onnx`.
    """

    images: Images | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    round_inner: Merge = "all"


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        ending: End of the file's name, with its dot.
        write: Function that writes a network to a path.
        description: Content of the file in a few words.
        use: Command or file that runs a written file, with ``{path}`` for its path.
        parts: Whether the format holds single modules of a network, such as its stem. Nothing is measured for them.
    """

    ending: str
    write: Callable[[SpikingNetwork, Path, ExportOptions], object]
    description: str
    use: str = "qsd run IMAGE --model {path}"
    parts: bool = False


def _write_onnx(spiking: SpikingNetwork, path: Path, options: ExportOptions) -> None:
    to_onnx(spiking, path, images=options.images, notes=options.notes)


def _write_integer_onnx(spiking: SpikingNetwork, path: Path, options: ExportOptions) -> None:
    to_onnx(spiking, path, True, options.images, options.notes, options.round_inner)


def _write_packed(spiking: SpikingNetwork, path: Path, options: ExportOptions) -> None:
    save_packed(spiking, path, options.notes)


def _write_nir(spiking: SpikingNetwork, path: Path, options: ExportOptions) -> None:
    to_nir(spiking, path, notes=options.notes)


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", _write_onnx, "ONNX with floats"),
    "onnx-int8": Format(".int8.onnx", _write_integer_onnx, "ONNX with integer convolutions on spike counts"),
    "packed": Format(".packed.safetensors", _write_packed, "packed weights of few bits, for qsd itself"),
    "nir": Format(".nir", _write_nir, "NIR graph of a part without attention", "the schedule {path}.json", parts=True),
}
