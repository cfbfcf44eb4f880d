"""Converting a trained detector or segmenter, and measuring everything that its report says."""

import copy
import math
from collections.abc import Collection, Iterator
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, init_default_scope
from rich.progress import track
from torch import Tensor

import qsd
from qsd.energy import Preset
from qsd.errors import QsdError
from qsd.mm.comparison import compare_model
from qsd.mm.conversion import Batch, SpikingModel, convert_model, predict, total_energy
from qsd.packing import model_size, save_packed
from qsd.report import Record
from qsd.report.files import PAGE, RECORD, all_or_none, write_record
from qsd.report.recording import Activity, weight_bits
from qsd.spiking.compare import full_float32
from qsd.spiking.merging import Merge

STAGES = ("compare", "activity", "audit", "energy")
PACKED = "quantized.safetensors"
FILES = (PACKED, RECORD, PAGE)


class Scenes:
    """The first images of a data set, one in a batch, loaded when they are asked for.

    Args:
        dataset: of mmdet or mmseg.
        count: how many; ``None`` for all.
    """

    def __init__(self, dataset: Any, count: int | None = None) -> None:
        self.dataset = dataset
        self.count = len(dataset) if count is None else min(count, len(dataset))

    @property
    def complete(self) -> bool:
        """Whether these are all images of the data set."""
        return self.count == len(self.dataset)

    def first(self, count: int) -> "Scenes":
        """The first of these.

        Args:
            count: how many, at most.
        """
        return Scenes(self.dataset, min(count, self.count))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return (pseudo_collate([self.dataset[i]]) for i in range(self.count))


def load_scenes(config: Config, part: str) -> tuple[Any, Evaluator]:
    """The data set of a part, and what evaluates predictions of it.

    Args:
        config: of a training.
        part: ``"val"`` or ``"test"``.

    Raises:
        QsdError: if the configuration has no such part.
    """
    if config.get(f"{part}_dataloader") is None or config.get(f"{part}_evaluator") is None:
        raise QsdError(f"the configuration has no {part}_dataloader and {part}_evaluator; choose another part.")
    init_default_scope(config.default_scope)
    dataset = DATASETS.build(config[f"{part}_dataloader"].dataset)
    evaluator = Evaluator(config[f"{part}_evaluator"])
    evaluator.dataset_meta = dataset.metainfo
    return dataset, evaluator


@torch.no_grad()
@full_float32()
def record_model(
    trained: Any,
    scenes: Scenes,
    *,
    evaluator: Evaluator | None = None,
    name: str = "the network",
    checkpoint: str | None = None,
    source: str = "images",
    delay: int | None = None,
    merge: Merge = True,
    merged_bits: int | None = None,
    preset: Preset = "fp32",
    step_images: int = 8,
    stages: Collection[str] = STAGES,
    progress: bool = True,
) -> tuple[SpikingModel, Record]:
    """Convert a trained detector or segmenter, and measure what came out.

    Args:
        trained: the model; it is not changed.
        scenes: images to measure on.
        evaluator: of the data set's metrics, which are measured if the scenes are all of it.
        name: of the model, for the report.
        checkpoint: where its weights come from, for the report.
        source: what the images are, in words.
        delay: as in `qsd.to_spike_driven`.
        merge: as in `qsd.to_spike_driven`.
        merged_bits: as in `qsd.to_spike_driven`.
        preset: as in `qsd.measure_energy`.
        step_images: images that are stepped through time, for the comparison spike by spike and the audit.
        stages: what to measure beside the metrics, of `STAGES`.
        progress: show progress bars.

    Returns:
        The spiking model, and the record: plain data for JSON, and for `qsd.report.html`.

    Raises:
        QsdError: if the model cannot be converted, or there are no images.
    """
    if not len(scenes):
        raise QsdError("there are no images to measure on; give at least one.")
    trained = copy.deepcopy(trained).eval()
    spiking = convert_model(trained, delay, merge, merged_bits)
    stepped = scenes.first(step_images)
    activity = Activity(spiking.time_steps) if "activity" in stages else None
    accuracy, inputs = _accuracy(trained, spiking, scenes, evaluator, activity, progress)
    energies = spiking.energy(scenes, preset, progress) if "energy" in stages else {}
    batch = next(iter(scenes))
    sizes = asdict(model_size(trained))
    sizes["converted_bytes"] = sum(model_size(network).converted_bytes or 0 for network in spiking.segments.values())
    return spiking, {
        "qsd": qsd.__version__,
        "left_out": [stage for stage in STAGES if stage not in stages],
        "model": {
            "name": name,
            "checkpoint": checkpoint,
            "time_steps": spiking.time_steps,
            "weight_bits": weight_bits(trained),
        },
        "data": {"description": f"{len(scenes)} {source}", "image_size": list(batch["inputs"][0].shape)},
        "conversion": {"merge": merge, "merged_bits": merged_bits, "delay": delay},
        "accuracy": accuracy,
        "comparison": _comparison(trained, merge, merged_bits, scenes, stepped, progress)
        if "compare" in stages
        else [],
        "delays": None,
        "latency": {"steps": spiking.latency(), "interval": spiking.interval()},
        "neurons": [] if activity is None else activity.neurons(len(scenes)),
        "raster": None,
        "audit": spiking.audit(stepped, progress=progress).to_dict() if "audit" in stages else None,
        "energy": total_energy(energies).to_dict() if energies else None,
        "sizes": {**sizes, "file_bytes": None},
        "segments": [
            {
                "name": part,
                "latency": network.latency(),
                "interval": network.interval(),
                "inputs": inputs.get(part, 0) / len(scenes),
                "energy_mj": energies[part].total_mj if energies else None,
            }
            for part, network in spiking.segments.items()
        ],
    }


def write_model(trained: Any, scenes: Scenes, folder: str | Path, config: str | None = None, **options: Any) -> Record:
    """Convert a trained detector or segmenter, measure it, and write its packed weights, record and report.

    ``quantized.safetensors`` holds the trained model at its real precision: `qsd.load_packed` loads it into a model of
    the same configuration (kept in the file's notes), and `convert_model` converts that again.

    Args:
        trained: see `record_model`.
        scenes: see `record_model`.
        folder: where to; either all files are complete, or none is written.
        config: the configuration's text.
        **options: of `record_model`.

    Returns:
        The record.

    Raises:
        QsdError: see `record_model`; and if the files cannot be written.
    """
    with all_or_none(folder) as partial:
        _, record = record_model(trained, scenes, **options)
        classes = (getattr(trained, "dataset_meta", None) or {}).get("classes", ())
        save_packed(trained, partial / PACKED, {"class_names": list(classes), "config": config})
        write_record(record, partial, partial / PACKED)
    return record


def _accuracy(
    trained: Any,
    spiking: SpikingModel,
    scenes: Scenes,
    evaluator: Evaluator | None,
    activity: Activity | None,
    progress: bool,
) -> tuple[dict[str, Any], dict[str, int]]:
    """The data set's metrics before and after, and how often each segment ran."""
    lossless = spiking.lossless
    inputs: dict[str, int] = {}

    def run(name: str, x: Tensor) -> Any:
        inputs[name] = inputs.get(name, 0) + len(x)
        network = spiking.segments[name]
        return network(x) if lossless else network.simulate(x).logits

    measured = evaluator if scenes.complete else None
    found: list[dict[str, float]] = []
    for model in (trained, spiking.model) if measured else (spiking.model,):
        with spiking.running(run), spiking.counting(activity or (lambda _name, _counts: None)):
            for batch in scenes if not progress else track(scenes, "accuracy", transient=True):
                samples = predict(model, batch)
                if measured:
                    measured.process(data_samples=samples, data_batch=batch)
        found.append(_metrics(measured) if measured else {})
    metrics = [{"name": key, "quantized": found[0][key], "spiking": value} for key, value in found[-1].items()]
    accuracy = {
        "images": len(scenes),
        "way": "count" if lossless else "simulate",
        "dtype": str(next(trained.parameters()).dtype).removeprefix("torch."),
        "metrics": metrics,
    }
    return accuracy, inputs


def _metrics(evaluator: Evaluator) -> dict[str, float]:
    """What was processed, evaluated by this process alone: `Evaluator.evaluate` would wait for the others."""
    found: dict[str, float] = {}
    for metric in evaluator.metrics:
        for key, value in metric.compute_metrics(metric.results).items():
            # What does not occur has none: a class, or, by COCO's convention -1, a size of objects.
            if isinstance(value, Real) and math.isfinite(value) and value != -1:
                found[f"{metric.prefix}/{key}" if metric.prefix else key] = float(value)
        metric.results.clear()
    return found


def _comparison(
    trained: Any, merge: Merge, merged_bits: int | None, scenes: Scenes, stepped: Scenes, progress: bool
) -> list[dict[str, Any]]:
    """Counts and predictions in float64, both ways, and in float32, at the lossless delay."""
    found = []
    ways: tuple[Literal["count", "simulate"], ...]
    for dtype, ways in ((torch.float64, ("count", "simulate")), (torch.float32, ("count",))):
        model = copy.deepcopy(trained).to(dtype)
        spiking = convert_model(model, None, merge, merged_bits)
        for way in ways:
            batches = scenes if way == "count" else stepped
            found.append(compare_model(model, spiking, batches, way, progress).to_dict())
    return found
