"""Weights by timm's own roads: files that ``pretrained=True`` names, folders, and state dicts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models._features import FeatureGetterNet
from torch import nn

from qsd.errors import QsdError
from qsd.layers import initialize_steps
from qsd.models.checkpoints import converted_state, load_state, read_state_dict
from qsd.models.fetching import HubFileMissing, fetch_from_hub, fetch_url, parse_hub_address
from qsd.models.first_layer import adapt_first
from qsd.models.published import shortened

# Names of weights in a folder, as timm and the Hugging Face Hub write them, and then any single file of these endings.
_NAMES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", "model.pth", "model.ckpt")
_ENDINGS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")


def load_pretrained(
    model: nn.Module, hint: str, first_conv: str | None = None, cache_dir: str | Path | None = None
) -> None:
    """Load the weights that a model's ``pretrained_cfg`` names.

    They are a ``file``, a folder (``local-dir:``), a ``state_dict``, or an address (``hf-hub:``, ``url``) whose file is
    fetched once. A first convolution for another number of channels is adapted as timm does, and its step sizes are
    measured again. The classifier of another number of classes keeps its initial values.

    Args:
        model: Fresh model of this package, as timm builds it.
        hint: The answer where no weights are named.
        first_conv: Name of the first convolution, where the configuration does not tell it.
        cache_dir: Folder for files that are fetched; ``None`` for the usual ones.

    Raises:
        QsdError: If no weights are named, if they cannot be fetched or read, or do not fit the model.
    """
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    source = _named_weights(cfg, cache_dir)
    if source is None:
        raise QsdError(hint)
    state = read_state_dict(source)
    state = converted_state(state)
    network: Any = model
    if isinstance(model, FeatureGetterNet):  # of `features_only=True`, which may lack the last stages
        network = model.model
        state = {name: tensor for name, tensor in state.items() if name in network.state_dict()}
    first = cfg.get("first_conv") or first_conv
    adapted = isinstance(first, str) and adapt_first(network, state, first)
    load_state(network, state, "the state dict" if isinstance(source, Mapping) else str(source))
    if adapted:
        initialize_steps(network.get_submodule(str(first)))


def _named_weights(cfg: Mapping[str, Any], cache_dir: str | Path | None) -> Any:
    """The file or state dict that a configuration names, or ``None``."""
    named = cfg.get("state_dict") or cfg.get("file")
    if named:
        return named if isinstance(named, Mapping) else weights_file(named)
    if repository := cfg.get("hf_hub_id"):
        return _hub_weights(str(repository), cfg.get("hf_hub_filename"), cache_dir)
    url = cfg.get("url")
    return fetch_url(str(url), cache_dir) if url else None


def _hub_weights(address: str, name: str | None, cache_dir: str | Path | None) -> Path:
    """The file of weights of a repository of the hub, under one of the usual names."""
    file = parse_hub_address(address)
    for candidate in [name or file.name] if name or file.name else _NAMES:
        try:
            return fetch_from_hub(file._replace(name=candidate), cache_dir)
        except HubFileMissing as error:
            missing = error
    raise missing


def weights_file(path: str | Path) -> Path:
    """The file with weights that a path leads to: the path itself, or the one in a folder.

    Args:
        path: A file, or a folder with weights as timm and the Hugging Face Hub lay them out.

    Raises:
        QsdError: If the folder has no weights, or several of which none has a usual name.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    found = next((path / name for name in _NAMES if (path / name).is_file()), None)
    if found is not None:
        return found
    files = sorted(file for file in path.iterdir() if file.suffix in _ENDINGS and file.is_file())
    if len(files) != 1:
        names = shortened([file.name for file in files]) if files else "none"
        raise QsdError(f"the folder {path} needs one file of weights, such as model.safetensors; it has {names}.")
    return files[0]
