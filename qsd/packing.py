"""Networks stored at their real precision, and their sizes in bytes.

A spiking network is stored as the trained network and the settings of its conversion, which is repeated at loading.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.models.compact import CompactModel
from qsd.models.packed_file import MERGED, read_packed, write_packed
from qsd.models.packed_header import ConversionSettings, PackedHeader, Registered
from qsd.spiking import SpikingNetwork
from qsd.spiking.conversion import convert
from qsd.spiking.layers import Convolution

# The header says true and false for these, as version 0.1.0 does, which reads the file then.
_MERGE_FLAGS = {"all": True, "none": False}


def save_packed(model: nn.Module, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Store a quantized or a spiking network at its real precision.

    Loaded again, a quantized network gives the same logits, bit for bit, and can be trained further, from its quantized
    weights (their former values between two grid points are not stored). A spiking network is stored as the trained
    network, and the same conversion is repeated when it is loaded; its delays are stored as they are now. With
    ``merged_bits`` the integers of the merged kernels are stored too.

    Args:
        model: Network of this package, or built from its layers, or converted by `qsd.to_spike_driven`.
        path: File to write; one that exists is replaced.
        notes: Further facts to store, as JSON: names of classes, normalisation. `read_notes` returns them.

    Raises:
        QsdError: If the file cannot be written, the notes are no JSON, or weights are not finite.
    """
    spiking = model if isinstance(model, SpikingNetwork) else None
    compact = CompactModel.of(model) if spiking is None else spiking.trained
    tensors = {name: tensor for name, tensor in compact.tensors.items() if name not in compact.bits}
    integers = {name: (compact.tensors[name], bits) for name, bits in compact.bits.items()}
    for name, kernel in _quantized_kernels(spiking).items():
        assert spiking is not None
        assert spiking.merged_bits is not None
        assert kernel.scale is not None
        integers[f"{MERGED}{name}.weight"] = kernel.integers().cpu(), spiking.merged_bits
        tensors[f"{MERGED}{name}.scale"] = kernel.scale.cpu()
        tensors[f"{MERGED}{name}.bias"] = kernel.bias.cpu()
    header = PackedHeader(
        kind="quantized" if spiking is None else "spiking",
        model=None if compact.registered is None else Registered(**compact.registered),
        parameters=compact.parameters,
        time_steps=compact.time_steps,
        conversion=None if spiking is None else _settings(spiking),
        notes=dict(notes or {}),
    )
    write_packed(path, header, tensors, integers)


def load_packed(path: str | Path, model: nn.Module | None = None) -> Any:
    """Load what `save_packed` stored.

    Args:
        path: The file.
        model: A model of the same structure to load into, for models that timm does not know; registered ones are
            built.

    Returns:
        A quantized model in evaluation mode, or a `SpikingNetwork`.

    Raises:
        QsdError: If the file is missing, damaged, no packed file or of a newer version; or it does not fit the model.
    """
    header, tensors = read_packed(path)
    merged = {name.removeprefix(MERGED): tensors.pop(name) for name in [*tensors] if name.startswith(MERGED)}
    bits = {name: entry.bits for name, entry in header.packed.items() if name in tensors}
    registered = None if header.model is None else header.model.model_dump()
    trained = CompactModel(tensors, bits, header.time_steps, registered, header.parameters).build(model).eval()
    settings = header.conversion
    if settings is None:
        return trained
    example = torch.zeros(settings.example, dtype=torch.float64)
    try:
        spiking = convert(
            trained, settings.delays, settings.merge, settings.merged_bits, example, check=False, code=settings.code
        )
    except RuntimeError as error:
        raise QsdError(
            f"packed file {path} cannot be read: its model does not take the images {settings.example} that it was "
            "converted with."
        ) from error
    _restore_kernels(spiking, merged, path)
    return spiking.to(getattr(torch, settings.dtype))


def _restore_kernels(spiking: SpikingNetwork, merged: Mapping[str, Tensor], path: str | Path) -> None:
    """Give quantized merged kernels the stored integers: computed again on another machine, some might differ.

    Raises:
        QsdError: If the stored kernels are not those of the network.
    """
    kernels = _quantized_kernels(spiking)
    stored = {
        f"{name}.{key}": tensor
        for name, kernel in kernels.items()
        for key, tensor in (("weight", kernel.weight), ("scale", kernel.scale), ("bias", kernel.bias))
    }
    wrong = [key for key in stored.keys() | merged.keys() if not _same_shape(stored.get(key), merged.get(key))]
    if wrong:
        raise QsdError(f"packed file {path} cannot be read: its merged kernel {min(wrong)} is not one of its model.")
    for name, kernel in kernels.items():
        kernel.restore(*(merged[f"{name}.{key}"] for key in ("weight", "scale", "bias")))


def _same_shape(first: Tensor | None, second: Tensor | None) -> bool:
    return first is not None and second is not None and first.shape == second.shape


def read_notes(path: str | Path) -> dict[str, Any]:
    """The notes that `save_packed` was given.

    Args:
        path: The file.

    Raises:
        QsdError: As `load_packed`.
    """
    return read_packed(path)[0].notes


def image_notes(data: Any) -> dict[str, Any]:
    """Facts about the images that a user of a file needs: classes, normalisation, size and crop.

    Args:
        data: A data module, such as `qsd.data.ImageData`; facts that it does not have are left out.
    """
    keys = ("class_names", "mean", "std", "img_size", "crop_pct", "interpolation", "recordings")
    facts = {key: getattr(data, key, None) for key in keys}
    if getattr(data, "exif_orientation", "upright") != "upright":
        facts["exif_orientation"] = data.exif_orientation
    return {key: value for key, value in facts.items() if value is not None}


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a network in bytes, without a file's header and before compression.

    Attributes:
        parameters: Number of parameters, step sizes not counted.
        float_bytes: Parameters and statistics of the network with float weights, at 4 bytes each.
        packed_bytes: Quantized weights at their bit width, step sizes and the rest in their own type.
        converted_bytes: The network of binary spikes, norms folded in: weights at their bit width, one scale and one
            bias by output channel at 4 bytes; merged kernels at ``merged_bits`` or, without, at 4 bytes a weight.
            ``None`` for a trained network.
        float_equivalents: The papers' figure, parameters times bits over 32; neither a count nor bytes.
    """

    parameters: int
    float_bytes: int
    packed_bytes: int
    converted_bytes: int | None
    float_equivalents: float


def model_size(model: nn.Module) -> ModelSize:
    """Sizes of a quantized or a spiking network.

    Args:
        model: Network of this package, or built from its layers, or converted by `qsd.to_spike_driven`.
    """
    spiking = model if isinstance(model, SpikingNetwork) else None
    compact = CompactModel.of(model) if spiking is None else spiking.trained
    weights = sum(compact.tensors[name].numel() for name in compact.bits)
    bits = sum(compact.tensors[name].numel() * width for name, width in compact.bits.items())
    rest = [(name, tensor) for name, tensor in compact.tensors.items() if name not in compact.bits]
    floats = sum(t.numel() for name, t in rest if t.is_floating_point() and name not in compact.steps)
    return ModelSize(
        parameters=compact.parameters,
        float_bytes=4 * (weights + floats),
        packed_bytes=math.ceil(bits / 8) + sum(t.numel() * t.element_size() for _, t in rest),
        converted_bytes=None if spiking is None else _converted_bytes(spiking),
        float_equivalents=compact.parameters * (bits / weights if weights else 32) / 32,
    )


def _converted_bytes(spiking: SpikingNetwork) -> int:
    bits = (layer.stored_bits(spiking.trained.bits, spiking.merged_bits) for layer in spiking.layers().values())
    return math.ceil(sum(bits) / 8)


def _quantized_kernels(spiking: SpikingNetwork | None) -> dict[str, Convolution]:
    if spiking is None or spiking.merged_bits is None:
        return {}
    return {name: chain.merged for name, chain in spiking.chains().items() if chain.merged is not None}


def _settings(spiking: SpikingNetwork) -> ConversionSettings:
    return ConversionSettings.model_validate(
        {
            "delays": {name: neuron.delay for name, neuron in spiking.neurons().items()},
            "merge": _MERGE_FLAGS.get(spiking.merge, spiking.merge),
            "merged_bits": spiking.merged_bits,
            "example": list(spiking.example.shape),
            "dtype": str(next(spiking.buffers()).dtype).removeprefix("torch."),
            "code": spiking.code.name,
        }
    )
