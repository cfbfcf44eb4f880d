"""Weights by timm's own roads: files that ``pretrained=True`` names, folders, and state dicts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models._features import FeatureGetterNet
from torch import nn

from qsd.errors import QsdError
from qsd.layers import initialize_steps
from qsd.models.checkpoints import converted_state, load_state, read_state_dict
from qsd.models.first_layer import adapt_first
from qsd.models.published import shortened

# Names of weights in a folder, as timm and the Hugging Face Hub write them, and then any single file of these endings.
_NAMES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", "model.pth", "model.ckpt")
_ENDINGS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")


def load_pretrained(model: nn.Module, hint: str, first_conv: str | None = None) -> None:
    """Load the weights that a model's ``pretrained_cfg`` names: ``file``, a folder (``local-dir:``), or ``state_dict``.

    A first convolution for another number of channels is adapted as timm does, and its step sizes are measured again.
    The classifier of another number of classes keeps its initial values.

    Args:
        model: Fresh model of this package, as timm builds it.
        hint: The answer where no weights are named.
        first_conv: Name of the first convolution, where the configuration does not tell it.

    Raises:
        QsdError: If no weights are named, if they lie on a server, cannot be read, or do not fit the model.
    """
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    named = cfg.get("state_dict") or cfg.get("file")
    if not named:
        address = cfg.get("hf_hub_id") or cfg.get("url")
        if address:
            raise QsdError(
                f"weights at {address!r} are not fetched; download them, and name the file with "
                "pretrained_cfg_overlay=dict(file=...), or the folder as model local-dir:FOLDER."
            )
        raise QsdError(hint)
    source: Any = named if isinstance(named, Mapping) else weights_file(named)
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
