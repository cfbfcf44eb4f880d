"""Trained detectors and segmenters from files: reading checkpoints, building models, moving their data."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor

from qsd.errors import QsdError
from qsd.mm.checkpoints import read_mm_checkpoint, stored_config
from qsd.reading import part_of


def load_model(
    checkpoint: str | Path, device: str = "cpu", options: Mapping[str, Any] | None = None
) -> tuple[Any, Config]:
    """Load a trained model and the configuration of its training from a checkpoint.

    Args:
        checkpoint: A ``.pth`` file that mmengine wrote during a training.
        device: The device of the model's parameters.
        options: Settings of the configuration to override; a new ``data_root`` replaces the old one wherever the
            configuration uses it.

    Returns:
        The model in evaluation mode, and its configuration.

    Raises:
        QsdError: If the file does not exist or is no such checkpoint, or if the data's folder does not exist.
    """
    content = read_mm_checkpoint(checkpoint)
    config = stored_config(content, checkpoint)
    weights = part_of(content, "state_dict", dict, checkpoint)
    dataset_meta = part_of(content, "meta.dataset_meta", dict, checkpoint)
    classes = dataset_meta.get("classes")
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        raise QsdError(f"{checkpoint} does not tell the names of its classes (meta.dataset_meta.classes).")
    root = config.get("data_root")
    config.merge_from_dict(dict(options or {}))
    if root is not None and config.data_root != root:
        move_data(config, root, config.data_root)
    try:
        return build_model(config, weights, dataset_meta).to(device), config
    except QsdError:
        raise
    except Exception as error:  # whatever OpenMMLab's classes say of arguments that do not fit
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise QsdError(f"the model of {checkpoint} cannot be built: {reason}") from error


def build_model(config: Config, weights: Mapping[str, Tensor], dataset_meta: Mapping[str, Any]) -> Any:
    """Build a model in evaluation mode with given weights.

    Args:
        config: The configuration of the model's training.
        weights: The model's state dict.
        dataset_meta: The names of the classes, as mmengine's data sets give them.
    """
    init_default_scope(config.default_scope)
    options = copy.deepcopy(config.model)
    options.backbone.pop("init_cfg", None)
    model = MODELS.build(options)
    model.load_state_dict(weights)
    model.dataset_meta = dataset_meta
    return model.eval()


def unwrapped(model: Any) -> Any:
    """The model without the wrapper that distributes it over processes.

    Args:
        model: The model of a Runner.
    """
    return model.module if is_model_wrapper(model) else model


def move_data(config: Config, old: str, new: str) -> None:
    """Replace the folder of the data wherever a configuration uses it.

    Args:
        config: The configuration, which is changed in place.
        old: The configuration's ``data_root``.
        new: The folder that replaces it.

    Raises:
        QsdError: If the new folder does not exist.
    """
    old, new = str(old).rstrip("/"), str(new).rstrip("/")
    if not Path(new).is_dir():
        raise QsdError(f"the data's folder {new} does not exist; give yours with --cfg-options data_root=DIR")
    if new != old:
        config.merge_from_dict(_replace_prefix(config.to_dict(), old, new))


def _replace_prefix(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _replace_prefix(item, old, new) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replace_prefix(item, old, new) for item in value)
    if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value[len(old) :]
    return value
