"""Data that do not fit the model, named before the training begins."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.fileio import get_file_backend
from mmengine.runner import Runner
from PIL import Image
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.mm.checkpoints import read_mm_checkpoint

_EMPTY = "holds no images to {} on, or none of the classes asked for."
_MISSING = "the {} data need {}, which does not exist; correct data_root, or the data set's ann_file or data_prefix."
_LOOKED_AT = 8  # images, or label maps, of which the first ones are looked at
_IGNORED = 255  # what `reduce_zero_label` makes of 0


def check_data(runner: Runner, parts: tuple[str, ...]) -> None:
    """Refuse missing files, empty data, and classes that an annotation file or the model lacks.

    Args:
        runner: built from a configuration.
        parts: of ``"train"``, ``"val"`` and ``"test"``, those that will be used.

    Raises:
        QsdError: for the first thing that does not fit.
    """
    for part in parts:
        loop = _loop(runner, part)
        if loop is not None:
            _check_dataset(loop.dataloader.dataset, part, runner.cfg)


def check_weights(model: nn.Module, checkpoint: str) -> None:
    """Refuse a checkpoint that lacks parameters of a model: mmengine would warn, and go on with random ones.

    Args:
        model: built from a configuration, wrapped for several processes or not.
        checkpoint: file that mmengine reads.

    Raises:
        QsdError: if it cannot be read; with the first parameter that is missing or has another shape.
    """
    content = read_mm_checkpoint(checkpoint)
    weights = {str(name).removeprefix("module."): weight for name, weight in content.get("state_dict", content).items()}
    for name, parameter in model.named_parameters():
        found = weights.get(name.removeprefix("module."))
        if not isinstance(found, Tensor) or found.shape != parameter.shape:
            raise QsdError(
                f"checkpoint {checkpoint} is of another model than the configuration: its {name} "
                f"{f'has the shape {list(found.shape)}' if isinstance(found, Tensor) else 'is missing'}."
            )


def _loop(runner: Runner, part: str) -> Any:
    try:
        return getattr(runner, f"{part}_loop")
    except FileNotFoundError as error:
        raise QsdError(_MISSING.format(part, error.filename)) from error
    except ValueError as error:
        data = runner.cfg[f"{part}_dataloader"].dataset
        where = Path(data.get("data_root") or "", data.get("ann_file") or "")
        if isinstance(error, json.JSONDecodeError):
            raise QsdError(f"{where} is no JSON, or is cut off ({error}).") from error
        if "at least one array" not in str(error):  # what mmengine's data sets stumble over when they are empty
            raise
        raise QsdError(f"{where} {_EMPTY.format(part)}") from error


def _check_dataset(dataset: Any, part: str, config: Config) -> None:
    while hasattr(dataset, "dataset"):  # repeated, balanced, ...
        dataset = dataset.dataset
    if not hasattr(dataset, "metainfo") or not hasattr(dataset, "data_prefix"):
        return
    where = getattr(dataset, "ann_file", "") or next(iter(dataset.data_prefix.values()), "the data")
    classes = dataset.metainfo.get("classes") or ()
    if hasattr(dataset, "cat_ids") and len(dataset.cat_ids) < len(classes):
        _check_categories(Path(dataset.ann_file), classes)
    if len(dataset) == 0:
        raise QsdError(f"{where} {_EMPTY.format(part)}")
    for index in range(min(len(dataset), _LOOKED_AT)):
        path = dataset.get_data_info(index)["img_path"]
        if not get_file_backend(path).exists(path):
            raise QsdError(_MISSING.format(part, path))
    for name, number in _class_numbers(config.model):
        if number != len(classes):
            raise QsdError(
                f"model.{name}={number}, but the {part} data have {len(classes)} classes ({', '.join(classes[:3])}, "
                "...); make them equal."
            )
    if hasattr(dataset, "reduce_zero_label"):
        _check_maps(dataset, len(classes))


def _check_categories(file: Path, classes: tuple[str, ...]) -> None:
    known = {category["name"] for category in json.loads(file.read_text()).get("categories", [])}
    missing = [name for name in classes if name not in known]
    if missing:
        raise QsdError(
            f"{file} has no category {missing[0]!r} ({len(missing)} of {len(classes)} classes are missing; it has "
            f"{', '.join(sorted(known)[:3]) or 'none'}, ...); set dataset.metainfo.classes to its names."
        )


def _check_maps(dataset: Any, classes: int) -> None:
    """Look into a few label maps, which an index error deep in the loss would otherwise find."""
    for index in range(min(len(dataset), _LOOKED_AT)):
        path = dataset.get_data_info(index)["seg_map_path"]
        labels = np.unique(np.asarray(Image.open(path)))
        values = [int(v) - 1 if dataset.reduce_zero_label else int(v) for v in labels]
        wrong = [v for v in values if v >= classes and v != _IGNORED]
        if wrong:
            stored = wrong[0] + int(dataset.reduce_zero_label)
            raise QsdError(f"{path} holds the label {stored}, beyond the {classes} classes of the data set.")


def _class_numbers(part: Any, path: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(part, dict):
        for key, value in part.items():
            name = f"{path}.{key}" if path else key
            if key == "num_classes" and "rpn" not in path:
                yield name, value
            else:
                yield from _class_numbers(value, name)
    elif isinstance(part, list | tuple):
        for index, value in enumerate(part):
            yield from _class_numbers(value, f"{path}.{index}")
