"""Reading weights: checkpoints of qsd and of the families' published code, packed files, and state dicts."""

import argparse
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.layers import initialize_steps
from qsd.layers.renamed import present_name, rename_parameters
from qsd.layers.steps import has_no_step, step_names
from qsd.layers.wrappers import inner_model
from qsd.lsq import on_grid
from qsd.models.fetching import local_file
from qsd.models.first_layer import adapt_first
from qsd.models.packed_file import KEY, MERGED, read_packed
from qsd.models.published import PublishedCode, StateDict, shortened, steps_in_name
from qsd.models.variants import FAMILIES, family_of_code
from qsd.quantizers import StepSizeQuantizer
from qsd.reading import check_safetensors, read_safetensors, read_torch

logger = logging.getLogger(__name__)

# Types beside the weights in checkpoints of training scripts: their arguments and numpy's numbers.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.float64(0).__reduce__()[0],
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # 1.x and 2.x
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
]
_WRAPPERS = ("module.", "_orig_mod.", "model.")


def load_reference_weights(model: nn.Module, path_or_state_dict: str | Path | Mapping[str, Any]) -> None:
    """Load a checkpoint of the published classification code of QSD-Transformer or E-SpikeFormer.

    Tensors without effect in the published networks are dropped. A step size that the published code never initialised
    (a float checkpoint, or one that was not trained) is computed from the weights. The classifier of another number of
    classes is left out, with a warning, and keeps its initial values. Loading is otherwise strict, and nothing is
    changed when it fails.

    Args:
        model: A model of qsd of the checkpoint's family and size.
        path_or_state_dict: A ``.pth`` file, its address or its content; ``model`` / ``state_dict`` / ``module.``
            wrappings are removed.

    Raises:
        QsdError: If the file cannot be read, has another content, or does not fit the model.
    """
    source, state = _read(path_or_state_dict)
    code = published_code(state, source)
    steps, own = steps_in_name(source), getattr(model, "time_steps", None)
    if steps is not None and own is not None and steps != own:
        logger.warning(
            "the name of %s tells T = %d, and the model has T = %d; build it with time_steps=%d.",
            source, steps, own, steps,
        )  # fmt: skip
    load_state(model, code.convert(state), source)


def published_code(state: StateDict, source: str | Path) -> PublishedCode:
    """The published code that a state dict comes from.

    Args:
        state: State dict without wrappings.
        source: Its file, for the message.

    Raises:
        QsdError: If it comes from none.
    """
    family = family_of_code(state)
    if family is not None and family.published is not None:
        return family.published
    titles = [other.published.title for other in FAMILIES if other.published is not None]
    raise QsdError(
        f"{source} is no checkpoint of the published QSD-Transformer code, nor of another that qsd reads "
        f"({', '.join(titles[1:])}): it has no 'downsample1_1.*' tensors."
    )


def load_weights(model: nn.Module, path_or_state_dict: str | Path | Mapping[str, Any]) -> list[str]:
    """Load weights of any kind that qsd reads, to start a training from.

    Args:
        model: A model of qsd.
        path_or_state_dict: A checkpoint of qsd (``.ckpt``; with weight averaging, the averaged weights), a
            ``.safetensors`` file (of `qsd.save_packed` or plain), a bare state dict, or a checkpoint of the published
            code; or the address of a file, ``hf-hub:OWNER/NAME/FILE`` or https. A classifier of another number of
            classes is left out, with a warning.

    Returns:
        Names of the neurons' learned steps that the weights lack, as those of a float network do: set them from data
        with `qsd.initialize_neurons`.

    Raises:
        QsdError: As for `load_reference_weights`.
    """
    source, state = _read(path_or_state_dict)
    return load_state(model, converted_state(state), source)


def converted_state(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with the names of this package, whatever published code it comes from.

    Args:
        state: State dict without wrappings.
    """
    family = family_of_code(state)
    return dict(state) if family is None or family.published is None else dict(family.published.convert(state))


def adapted_state(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of a training's checkpoint, or of the published code, with the names of a model.

    Step sizes of weights that it lacks, because it is that of a float network, are measured.

    Args:
        model: The model that the tensors are for.
        state_dict: Tensors by name, perhaps under ``model.`` or another prefix.

    Raises:
        QsdError: If it comes from a packed file, whose integers only `qsd.load_packed` can read.
    """
    state = converted_state(_without_prefixes(state_dict))
    streams = [name for name, tensor in state.items() if isinstance(tensor, Tensor) and tensor.dtype == torch.uint8]
    if streams:
        raise QsdError(
            f"{streams[0]} is a stream of bytes of a packed file; load that with qsd.load_packed, or name it with "
            "pretrained=True and pretrained_cfg_overlay=dict(file=...)."
        )
    for name, module in model.named_modules():
        step, weight = f"{name}.step", state.get(f"{name.removesuffix('.quantizer')}.weight")
        if isinstance(module, StepSizeQuantizer) and step not in state and isinstance(weight, Tensor):
            state[step] = module.initial_step(weight)
    return state


def read_state_dict(path_or_state_dict: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, without wrappings.

    Args:
        path_or_state_dict: A ``.pth``, ``.ckpt``, ``.pt`` or ``.safetensors`` file, or its content.

    Raises:
        QsdError: If there is no such file, it cannot be read safely, or it has no tensors.
    """
    return _read(path_or_state_dict)[1]


def read_checkpoint(path: str | Path, allowed: Sequence[Any] = ()) -> Any:
    """The content of a checkpoint file, read without running code from it.

    Args:
        path: A ``.pth``, ``.ckpt``, ``.pt`` or ``.safetensors`` file.
        allowed: Further classes and functions that the file may name, see `qsd.reading.read_torch`.

    Raises:
        QsdError: If there is no such file, or it cannot be read safely.
    """
    if Path(path).suffix == ".safetensors":
        metadata = check_safetensors(path, "checkpoint")
        return _unpacked(Path(path)) if KEY in metadata else read_safetensors(path, "checkpoint")[1]
    return read_torch(path, [*_HARMLESS, *allowed])


def _unpacked(path: Path) -> dict[str, Tensor]:
    header, tensors = read_packed(path)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(MERGED)}
    for name in header.packed.keys() & tensors.keys():
        step = tensors.get(f"{name.removesuffix('weight')}quantizer.step")
        if step is None or step.shape != tensors[name].shape[:1]:
            raise QsdError(f"packed file {path} cannot be read: {name} has no step size.")
        tensors[name] = on_grid(tensors[name], step)
    return tensors


def _read(path_or_state_dict: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    if isinstance(path_or_state_dict, Mapping):
        return "the state dict", _unwrap("the state dict", path_or_state_dict)
    source = str(path_or_state_dict)
    return source, _unwrap(source, read_checkpoint(local_file(path_or_state_dict)))


def _unwrap(source: str, content: Any) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        found = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(found, Mapping):
            content = found
        elif found is not None and not isinstance(found, Tensor):
            raise _no_tensor(source, key, found)
    state = dict(content) if isinstance(content, Mapping) else {}
    other = [key for key, value in state.items() if not (isinstance(key, str) and _is_plain(value))]
    if other and len(other) < len(state):
        raise _no_tensor(source, other[0], state[other[0]])
    if not state or other:
        raise QsdError(
            f"{source} holds no state dict: expected tensors by name, perhaps under 'model' or 'state_dict'."
        )
    return _without_prefixes(state)


def _without_prefixes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    state = dict(state_dict)
    while (prefix := next((w for w in _WRAPPERS if all(name.startswith(w) for name in state)), None)) and state:
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    rename_parameters(state)
    return state


def _is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor of real numbers, neither quantized nor without data."""
    if not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and not (value.is_quantized or value.is_meta or value.is_complex())


def _no_tensor(source: str, key: Any, value: Any) -> QsdError:
    kind = f"{value.dtype} {value.layout}" if isinstance(value, Tensor) else type(value).__name__
    return QsdError(f"{source} holds no state dict: its part {key!r} is of type {kind}, where tensors belong.")


def load_state(model: nn.Module, state: dict[str, Tensor], source: str) -> list[str]:
    """Load tensors by the present names of their parameters, as `load_weights` does.

    Args:
        model: A model of qsd.
        state: Tensors by name.
        source: Name of the file, for messages.

    Returns:
        Names of the neurons' learned steps that are missing.

    Raises:
        QsdError: If the tensors do not fit; nothing is changed.
    """
    model = inner_model(model)
    expected = model.state_dict()
    classifiers = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    optional: set[str] = set()
    for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers:
        head = {name for name in expected if name.startswith(f"{classifier}.")}
        if not head:
            state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{classifier}.")}
        elif head & set(_reshaped(state, expected)) or not head & state.keys():
            logger.warning(
                "%s has no classifier for %s classes; the initial one stays.",
                source,
                getattr(model, "num_classes", "its"),
            )
            optional |= head
            state = {name: tensor for name, tensor in state.items() if name not in head}
    first = _adapted_first(model, state)
    # A float network has no step sizes, and neither has a checkpoint of a float network.
    steps = step_names(model)
    state = {name: t for name, t in state.items() if name in expected or not has_no_step(model, name)}
    counters = {name for name in expected if name.endswith(".num_batches_tracked")}
    check_weights(state, expected, source, steps, may_lack=optional | steps | counters)
    model.load_state_dict(state, strict=False)
    if first is not None:
        initialize_steps(model.get_submodule(first))
    missing = steps - state.keys() - optional
    of_weights = {name for name in missing if name.endswith(".quantizer.step")}
    for name in of_weights:
        initialize_steps(model.get_submodule(name.removesuffix(".quantizer.step")))
    return sorted(missing - of_weights)


def _adapted_first(model: nn.Module, state: dict[str, Tensor]) -> str | None:
    """The first convolution if its weights were adapted: those of images, for a network of recordings."""
    first = getattr(model, "pretrained_cfg", {}).get("first_conv")
    if getattr(model, "frame_axis", None) is None or not isinstance(first, str):
        return None
    return first if adapt_first(model, state, first) else None


def check_weights(
    state: StateDict,
    expected: StateDict,
    source: str,
    steps: Collection[str],
    may_lack: Collection[str] = frozenset(),
) -> None:
    """Refuse weights that a network cannot use.

    Args:
        state: Tensors to be loaded.
        expected: The network's own state dict.
        source: Name of the file, for the message.
        steps: Names of step sizes, which have to be positive.
        may_lack: Names that may be missing.

    Raises:
        QsdError: For names that are missing or unexpected, other shapes, values that are not finite, and step sizes
            that are not positive.
    """
    state = {present_name(name): tensor for name, tensor in state.items()}
    _raise_on_mismatch(
        source,
        missing=sorted(expected.keys() - state.keys() - set(may_lack)),
        unexpected=sorted(state.keys() - expected.keys()),
        reshaped=[
            f"{n} {tuple(state[n].shape)} instead of {tuple(expected[n].shape)}" for n in _reshaped(state, expected)
        ],
    )
    broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise QsdError(f"{source} has weights that are not finite: {shortened(broken)}; it cannot be used.")
    bad = [name for name, t in state.items() if name in steps and not bool((t > 0).all())]
    if bad:
        raise QsdError(f"{source} has step sizes that are not positive: {shortened(bad)}; it cannot be used.")


def _reshaped(state: StateDict, expected: StateDict) -> list[str]:
    return [name for name in sorted(expected.keys() & state.keys()) if expected[name].shape != state[name].shape]


def _raise_on_mismatch(source: str, missing: list[str], unexpected: list[str], reshaped: list[str]) -> None:
    parts = []
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)):
        if names:
            parts.append(f"{len(names)} {title}: {shortened(names)}")
    if parts:
        raise QsdError(
            f"{source} does not fit the model ({'; '.join(parts)}); build the model with the checkpoint's sizes."
        )
