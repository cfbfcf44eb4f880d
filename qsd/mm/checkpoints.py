"""Checkpoints of mmengine, read without running what they say.

mmengine falls back to unrestricted unpickling where the restricted one refuses a file, and executes the configurations
that lie in checkpoints. Here every file passes `qsd.reading`, and a configuration is parsed as literals.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from mmcv import ops
from mmengine import registry as registries
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import Registry, init_default_scope
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as checkpoint_module
from torch import Tensor

from qsd.errors import QsdError
from qsd.models.checkpoints import read_checkpoint
from qsd.models.registered import model_of_file
from qsd.reading import FileError, parse_assignments, part_of

_PACKAGES = ("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain", "qsd")  # whose registered names have such a prefix
_OUR_MODULES = ("qsd.mm", "qsd.mm.detection", "qsd.mm.segmentation")
_BUILT = ("model", "val_dataloader", "test_dataloader", "val_evaluator", "test_evaluator", "visualizer")
# What OpenMMLab's models fetch, at construction, from files and addresses that their arguments name.
_FETCHING_TYPES = {"BertModel", "CLIPTextEncoder", "VPD", "TIMMBackbone", "HuggingFace"}
_FETCHING_KEYS = {"checkpoint", "checkpoint_path", "teacher_ckpt", "teacher_config", "lang_model_name", "diffusion_cfg"}
# Metrics write to places that their arguments name, and readers of images fetch from them.
_PLACES = {
    *("outfile_prefix", "output_dir", "outdir", "out_dir", "out_file_path", "collect_dir", "proposals_file"),
    *("format_only", "backend_args", "file_client_args"),
}
# Data sets, transforms and metrics that unpickle files, or fetch them from addresses of their own.
_UNPICKLING = {
    *("RefCocoDataset", "OpenImagesDataset", "OpenImagesChallengeDataset", "CocoOccludedSeparatedMetric"),
    *("LoadBiomedicalData", "LoadBiomedicalImageFromFile", "LoadBiomedicalAnnotation"),
}
_PICKLES = (".pkl", ".pickle")
_ENDINGS = (
    *(".pth", ".ckpt", ".pt", ".safetensors", ".bin", ".onnx", ".py", ".json", ".yaml", ".yml", ".txt", ".csv"),
    *(".npy", ".npz", *_PICKLES),
)


def _statistic(owner: Any, name: Any) -> Any:
    """In place of ``getattr``, by which mmengine pickles the four functions of a loss history, and for nothing else."""
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise FileError(f"the file asks for getattr({str(owner)[:60]}, {str(name)[:60]}), which could run code.")
    return getattr(HistoryBuffer, name)


# The types that mmengine pickles beside tensors.
_HISTORIES: list[Any] = [
    np.ndarray,
    *((np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    HistoryBuffer,
    (_statistic, "builtins.getattr"),
]


def read_mm_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that mmengine wrote, or any other with a state dict.

    Args:
        path: Path of a ``.pth`` file.

    Returns:
        Its contents: ``state_dict`` (tensors by name), and where it has them ``meta``, ``optimizer`` and others.

    Raises:
        QsdError: If the file is missing, damaged, or wants to run code; if a part has another type.
    """
    content = read_checkpoint(path, _HISTORIES)
    if not isinstance(content, dict):
        raise FileError(f"checkpoint {path} holds a {type(content).__name__}, where a dictionary belongs.")
    if "state_dict" in content:
        weights = part_of(content, "state_dict", dict, path)
        other = [key for key, value in weights.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
        if other:
            kind = type(weights[other[0]]).__name__
            raise FileError(f"checkpoint {path} has the entry {other[0]!r} of type {kind} among its weights.")
    for name in ("meta", "message_hub"):
        part_of(content, name, dict, path, {})
    # mmengine would execute it when a training is resumed; it only compares the number of GPUs.
    (content.get("meta") or {}).pop("config", None)
    return content


def install() -> None:
    """Let mmengine read checkpoints of local files, and those that it fetches, through `read_mm_checkpoint`."""
    CheckpointLoader.register_scheme("", load_from_local, force=True)
    CheckpointLoader.register_scheme(("http://", "https://"), load_from_http, force=True)
    # The names of models (``open-mmlab://resnet50``) lead to these functions of the module.
    vars(checkpoint_module).update(load_from_http=load_from_http, _safe_torch_load=_load_file)


def _load_file(file: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
    """In place of mmengine's function that falls back to unrestricted unpickling; storage servers give it buffers."""
    del weights_only
    if isinstance(file, str | Path):
        return load_from_local(str(file), map_location)
    with tempfile.NamedTemporaryFile(suffix=".pth") as copy:
        copy.write(file.read())
        copy.flush()
        return load_from_local(copy.name, map_location)


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Mmengine's way to read a file, for ``load_from``, ``--resume`` and pretrained weights; it is called by that name.

    Args:
        filename: Path of a file.
        map_location: Ignored: tensors come to the CPU, and whoever takes them moves them.
    """
    del map_location
    return read_mm_checkpoint(Path(filename).expanduser())


def load_from_http(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Mmengine's way to read a checkpoint from the web, which keeps the file in torch.hub's folder.

    Args:
        filename: Address.
        map_location: Ignored, see `load_from_local`.
    """
    target = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(filename).path).name)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(filename, str(target))
    return load_from_local(str(target), map_location)


def stored_config(content: Mapping[str, Any], path: str | Path) -> Config:
    """The configuration of the training that wrote a checkpoint, as data.

    Args:
        content: Contents of the checkpoint.
        path: The checkpoint, for messages.

    Raises:
        QsdError: If there is none, if it is more than literals, or if it names types that are not registered, modules
            to import, or further files for its model.
    """
    text = part_of(content, "meta.cfg", str, path, "")
    if not text:
        raise QsdError(f"{path} is no checkpoint of a training with mmdet or mmseg.")
    values = parse_assignments(text, f"the configuration in {path}")
    imports = part_of(values, "custom_imports", dict, path, {}).get("imports", [])
    for module in [imports] if isinstance(imports, str) else list(imports):
        if module not in _OUR_MODULES:
            raise QsdError(
                f"the configuration in {path} imports {module!r}; files do not choose what is imported. Give a "
                "checkpoint that was trained with qsd's own modules."
            )
        __import__(module)
    values.pop("custom_imports", None)
    part_of(values, "model", dict, path)
    init_default_scope(part_of(values, "default_scope", str, path))
    known = _registered_names()
    for key in _BUILT:
        values[key] = _checked(values.get(key), key, known, str(path), key == "model")
    return Config({key: value for key, value in values.items() if value is not None})


def _registered_names() -> set[str]:
    """Names in all registries, and those of mmcv's operators, which a head names by ``type`` as well (``RoIAlign``)."""
    waiting = [entry for entry in vars(registries).values() if isinstance(entry, Registry)]
    names: set[str] = set(ops.__all__)
    while waiting:
        registry = waiting.pop()
        registry.import_from_location()
        names |= registry.module_dict.keys()
        waiting += registry.children.values()
    return names


def _checked(value: Any, where: str, known: set[str], path: str, of_model: bool) -> Any:
    """A part of a configuration with registered types only, and for a model, without weights from elsewhere."""
    if isinstance(value, list | tuple):
        return type(value)(_checked(item, where, known, path, of_model) for item in value)
    if not isinstance(value, dict):
        if of_model and isinstance(value, str) and _names_file(value):
            raise QsdError(f"the configuration in {path} has {where}={value[:80]!r}: files open no other files.")
        if isinstance(value, str) and value.lower().endswith(_PICKLES):  # which OpenMMLab reads without a safe reader
            raise QsdError(f"the configuration in {path} has {where}={value[:80]!r}: pickled data may run code.")
        return value
    left_out = ("init_cfg", "pretrained") if of_model else _PLACES
    part = {key: item for key, item in value.items() if key not in left_out or (not item and not of_model)}
    if "type" in part:
        part["type"] = _checked_type(part["type"], where, known, path)
        if of_model and part["type"].rsplit(".", 1)[-1] == "SpikeTransformerBackbone":
            name, arguments = model_of_file(path, part.get("model"), part.get("model_args"))
            part |= {"model": name, "model_args": arguments}
    if of_model:
        kind = str(part.get("type")).rsplit(".", 1)[-1]
        fetching = [key for key in part if key in _FETCHING_KEYS and part[key] is not None]
        if fetching or kind in _FETCHING_TYPES:
            raise QsdError(
                f"the configuration in {path} has {where}.{fetching[0] if fetching else f'type={kind}'}, which opens "
                "other files; files open no other files."
            )
    names = part.get("metainfo")
    if isinstance(names, dict) and any(isinstance(item, str) for item in names.values()):
        raise QsdError(f"the configuration in {path} has a text in {where}.metainfo, where OpenMMLab reads a file.")
    return {key: _checked(item, f"{where}.{key}", known, path, of_model) for key, item in part.items()}


def _checked_type(name: Any, where: str, known: set[str], path: str) -> str:
    parts = name.split(".") if isinstance(name, str) else []
    if not parts or parts[-1] not in known or (len(parts) > 1 and parts[0] not in _PACKAGES):
        raise QsdError(
            f"the configuration in {path} has {where}.type={str(name)[:80]!r}, which is not registered with OpenMMLab."
        )
    if parts[-1].startswith("Dump") or parts[-1] in _UNPICKLING:
        use = "writes files" if parts[-1].startswith("Dump") else "unpickles or fetches files"
        raise QsdError(f"the configuration in {path} has {where}.type={name!r}, which {use}; leave it out.")
    return parts[0] if len(parts) == 1 else f"{parts[0]}.{parts[-1]}"


def _names_file(text: str) -> bool:
    return "/" in text or text.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or text.lower().endswith(_ENDINGS)
