"""Data that do not fit the model, named before the training begins."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmcv.transforms import LoadAnnotations
from mmengine.config import Config
from mmengine.fileio import get_file_backend
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import Tensor, nn

from qsd.distributed import from_first_process
from qsd.errors import QsdError
from qsd.layers.renamed import present_name
from qsd.mm.annotations import Use, check_annotations
from qsd.mm.checkpoints import read_mm_checkpoint
from qsd.mm.label_maps import check_maps

_EMPTY = "holds no images to {} on, or none of the classes asked for."
_MISSING = "the {} data need {}, which does not exist; correct data_root, or the data set's ann_file or data_prefix."
_LOOKED_AT = 8  # images of data sets of other kinds, of which the first ones are looked at


def check_data(runner: Runner, parts: tuple[str, ...]) -> None:
    """Refuse missing files, empty data, wrong annotations, and classes that an annotation file or the model lacks.

    Files are looked at by the first process; the others wait.

    Args:
        runner: The runner that was built from a configuration.
        parts: The parts that will be used, of ``"train"``, ``"val"`` and ``"test"``.

    Raises:
        QsdError: For the first fault.
    """
    for part in parts:
        _in_first_process(runner, partial(_check_files, runner.cfg, part))
    for part in parts:
        loop = _loop(runner, part)
        if loop is not None:
            _in_first_process(runner, partial(_check_dataset, loop.dataloader.dataset, part, runner.cfg))


def _in_first_process(runner: Runner, check: Callable[[], Any]) -> None:
    problem = None
    if runner.rank == 0:
        try:
            check()
        except QsdError as error:
            problem = str(error)
    problem = from_first_process(problem)
    if problem is not None:
        raise QsdError(problem)


def _check_files(config: Config, part: str) -> None:
    """Check the annotation files of a part before mmdet loads them."""
    loader = config.get(f"{part}_dataloader")
    if not isinstance(loader, dict):
        return
    evaluators = config.get(f"{part}_evaluator") if part != "train" else None
    metrics = [m for m in _dictionaries(evaluators) if str(m.get("type", "")).endswith("CocoMetric")]
    segments = any("segm" in str(metric.get("metric", "")) for metric in metrics)
    checked = set()
    for data in _dictionaries(loader.get("dataset")):
        if not isinstance(data.get("type"), str) or "ann_file" not in data:
            continue
        with DATASETS.switch_scope_and_registry(None) as registry:  # that of mmdet, by the configuration's scope
            kind: Any = registry.get(data["type"])
        if not _is_coco(kind):
            continue
        classes = (data.get("metainfo") or {}).get("classes") or kind.METAINFO.get("classes")
        if isinstance(classes, str) and Path(classes).is_file():  # which mmengine reads as a list of names
            classes = None
        masks = any(step.get("with_mask") for step in _dictionaries(data.get("pipeline"))) or segments
        prefix = data.get("data_prefix") or {}
        root = data.get("data_root") or ""
        local = data.get("backend_args") is None
        folder = os.path.join(root, prefix.get("img_path") or prefix.get("img") or "") if local else None
        use = Use(classes, part != "test", masks, segments, folder)
        for path in [os.path.join(root, data["ann_file"]), *(m["ann_file"] for m in metrics if m.get("ann_file"))]:
            if local and path not in checked and Path(path).exists():
                checked.add(path)
                check_annotations(path, use)


def _is_coco(kind: Any) -> bool:
    """Whether a class reads COCO's files as mmdet's own does."""
    try:
        from mmdet.datasets import CocoDataset
    except ImportError:
        return False
    if not isinstance(kind, type) or not issubclass(kind, CocoDataset):
        return False
    ways = ("load_data_list", "parse_data_info")
    return all(getattr(kind, way) is getattr(CocoDataset, way) for way in ways)


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    """All dictionaries in a part of a configuration, at any depth."""
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _dictionaries(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _dictionaries(item)


def check_weights(model: nn.Module, checkpoint: str) -> None:
    """Refuse a checkpoint that lacks parameters of a model: mmengine would warn, and go on with random ones.

    Args:
        model: The model that was built from a configuration, wrapped for several processes or not.
        checkpoint: A file that mmengine reads.

    Raises:
        QsdError: If the file cannot be read, or for the first parameter that is missing or has another shape.
    """
    content = read_mm_checkpoint(checkpoint)
    state = content.get("state_dict", content)
    weights = {present_name(str(name).removeprefix("module.")): weight for name, weight in state.items()}
    for name, parameter in model.named_parameters():
        found = weights.get(name.removeprefix("module."))
        if not isinstance(found, Tensor) or found.shape != parameter.shape:
            raise QsdError(
                f"checkpoint {checkpoint} is of another model than the configuration: its {name} "
                f"{f'has the shape {list(found.shape)}' if isinstance(found, Tensor) else 'is missing'}."
            )
    broken = [
        name for name, tensor in weights.items() if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all()
    ]
    if broken:
        raise QsdError(f"checkpoint {checkpoint} has weights that are not finite: {broken[0]}; it cannot be used.")


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
    reads_labels = any(isinstance(step, LoadAnnotations) for step in dataset.pipeline.transforms)
    if hasattr(dataset, "reduce_zero_label") and reads_labels:
        check_maps(dataset, len(classes), range(len(dataset)), dataset.ignore_index)


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
