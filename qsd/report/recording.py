"""Converting a trained network and measuring everything that its report says."""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

import qsd
from qsd.energy import PRESETS, Preset, measure_energy
from qsd.errors import QsdError
from qsd.packing import model_size
from qsd.quantizers import StepSizeQuantizer
from qsd.spiking import SpikingNetwork, audit_spike_driven, compare_counts, to_spike_driven
from qsd.spiking.batches import image_batches
from qsd.spiking.compare import full_float32
from qsd.spiking.merging import Merge, check_merge

STAGES = ("compare", "delays", "activity", "audit", "energy")
_RASTER_IMAGES, _RASTER_NEURONS = 8, 48

Record = dict[str, Any]


@torch.no_grad()
@full_float32()
def record_conversion(
    trained: nn.Module,
    loader: Iterable[Any],
    *,
    name: str = "the network",
    checkpoint: str | None = None,
    source: str = "images",
    delay: int | Mapping[str, int] | None = None,
    merge: Merge = True,
    merged_bits: int | None = None,
    preset: Preset = "fp32",
    max_images: int | None = None,
    step_images: int = 100,
    float_accuracy: float | None = None,
    raster: str | None = None,
    stages: Collection[str] = STAGES,
    progress: bool = True,
) -> tuple[SpikingNetwork, Record]:
    """Convert a trained network to binary spikes, and measure what came out.

    Args:
        trained: quantized network of ours, or built from our layers; it is not changed.
        loader: batches of images ``[B, C, H, W]`` and labels ``[B]``, iterated several times.
        name: of the network, for the report.
        checkpoint: where its weights come from, for the report.
        source: what the images are, in words: "validation images of DigitsData".
        delay: as in `qsd.to_spike_driven`.
        merge: as in `qsd.to_spike_driven`.
        merged_bits: as in `qsd.to_spike_driven`.
        preset: prices of operations, as in `qsd.measure_energy`.
        max_images: measure on so many images; ``None`` for all of the loader.
        step_images: images that are stepped through time, which takes T times as long: for the comparison spike by
            spike, the delays and the audit.
        float_accuracy: of the float twin, a share, if it is known; it is not measured here.
        raster: name of the neuron whose spikes are drawn; ``None`` for the last attention's query.
        stages: what to measure beside the accuracy, of `STAGES`.
        progress: show progress bars.

    Returns:
        The spiking network, and the record: plain data for JSON, and for `qsd.report.html`.

    Raises:
        QsdError: if the network cannot be converted, the loader gives no labels, or an option is wrong.
    """
    check_options(merge, merged_bits, delay, preset, max_images, step_images, float_accuracy, stages)
    trained = copy.deepcopy(trained).eval()  # a copy is not compiled, and stays in evaluation
    images, _ = next(iter(image_batches(loader, trained, 1)))
    spiking = to_spike_driven(trained, delay, merge, merged_bits, example=images)
    steps = spiking.time_steps
    stepped = step_images if max_images is None else min(step_images, max_images)
    if raster is not None and raster not in spiking.neurons():
        raise QsdError(f"raster={raster!r} is no neuron of the network; the last is {list(spiking.neurons())[-1]!r}.")

    activity = Activity(steps) if "activity" in stages else None
    accuracy = _accuracy(trained, spiking, loader, max_images, activity, progress)
    return spiking, {
        "qsd": qsd.__version__,
        "left_out": [stage for stage in STAGES if stage not in stages],
        "model": {"name": name, "checkpoint": checkpoint, "time_steps": steps, "weight_bits": weight_bits(trained)},
        "data": {"description": f"{accuracy['images']} {source}", "image_size": list(images.shape[1:])},
        "conversion": {
            "merge": merge,
            "merged_bits": merged_bits,
            "delay": dict(delay) if isinstance(delay, Mapping) else delay,
        },
        "accuracy": {"float": float_accuracy, **accuracy},
        "comparison": _comparison(
            trained,
            lambda network: to_spike_driven(network, None, merge, merged_bits, example=images),
            loader,
            count=max_images,
            simulate=stepped,
            progress=progress,
        )
        if "compare" in stages
        else [],
        "delays": _delays(trained, spiking, loader, stepped, progress) if "delays" in stages else None,
        "latency": {"steps": spiking.latency(), "interval": spiking.interval()},
        "neurons": [] if activity is None else activity.neurons(accuracy["images"]),
        "raster": None if activity is None else _raster(spiking, loader, raster),
        "audit": audit_spike_driven(spiking, loader, max_images=stepped, progress=progress).to_dict()
        if "audit" in stages
        else None,
        "energy": measure_energy(spiking, loader, preset, max_images=max_images, progress=progress).to_dict()
        if "energy" in stages
        else None,
        "sizes": {**asdict(model_size(spiking)), "file_bytes": None},
        "segments": [],
    }


def check_options(
    merge: Merge,
    merged_bits: int | None,
    delay: int | Mapping[str, int] | None,
    preset: str,
    max_images: int | None,
    step_images: int,
    float_accuracy: float | None,
    stages: Collection[str],
    known_stages: Collection[str] = STAGES,
) -> None:
    """Refuse what `record_conversion` could not use, before a long training rather than behind it.

    Args:
        merge: see `record_conversion`.
        merged_bits: see `record_conversion`.
        delay: see `record_conversion`.
        preset: see `record_conversion`.
        max_images: see `record_conversion`.
        step_images: see `record_conversion`.
        float_accuracy: see `record_conversion`.
        stages: see `record_conversion`.
        known_stages: what stages there are.

    Raises:
        QsdError: if one of them is wrong.
    """
    check_merge(merge, merged_bits)
    if isinstance(delay, int) and delay < 0:
        raise QsdError(f"delay={delay} is negative; leave it out for T - 1, which is lossless.")
    if preset not in PRESETS:
        raise QsdError(f"preset={preset!r} is unknown; use one of {', '.join(PRESETS)}.")
    for key, number in (("max_images", max_images), ("step_images", step_images)):
        if number is not None and number < 1:
            raise QsdError(f"{key}={number} is not positive; leave it out for the default.")
    if float_accuracy is not None and not 0 <= float_accuracy <= 1:
        raise QsdError(f"float_accuracy={float_accuracy} is no share from 0 to 1.")
    if unknown := [stage for stage in stages if stage not in known_stages]:
        raise QsdError(f"stage {unknown[0]!r} is unknown; choose from {', '.join(known_stages)}.")


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The main figures of a record by name, for loggers.

    Args:
        record: what `record_conversion` returned.
    """
    accuracy, energy = record["accuracy"], record["energy"]
    found = {"latency_steps": record["latency"]["steps"], "packed_bytes": record["sizes"]["packed_bytes"]}
    if "metrics" in accuracy:  # of a detector or segmenter
        found |= {metric["name"]: metric["spiking"] for metric in accuracy["metrics"]}
    else:
        found["accuracy"], found["quantized_accuracy"] = accuracy["spiking"], accuracy["quantized"]
        found["class_agreement"] = accuracy["class_agreement"]
    for c in record["comparison"]:
        found[f"changed_images_{c['dtype']}_{c['way']}"] = c["changed_images"] / c["images"]
    for row in (record["delays"] or {"rows": []})["rows"]:
        found[f"accuracy_delay_{row['delay']}"] = row["accuracy"]
    if energy:
        found |= {f"energy_{key}_mj": value for key, value in energy["total_mj"].items() if value is not None}
    if record["audit"]:
        found["spike_driven"] = record["audit"]["spike_driven"]
    return {f"spiking/{key}": float(value) for key, value in found.items()}


class Activity:
    """Adds up how often each spike count occurs, by neuron.

    Args:
        time_steps: T.
    """

    def __init__(self, time_steps: int) -> None:
        self.time_steps = time_steps
        self.histograms: dict[str, Tensor] = {}

    def __call__(self, name: str, counts: Tensor) -> None:
        histogram = torch.bincount(counts.flatten().long(), minlength=self.time_steps + 1).cpu()
        self.histograms[name] = self.histograms.get(name, torch.zeros_like(histogram)) + histogram

    def neurons(self, images: int) -> list[dict[str, Any]]:
        """One entry per neuron, in the order of execution.

        Args:
            images: seen in all.
        """
        found = []
        for name, histogram in self.histograms.items():
            total = int(histogram.sum())
            spikes = int((histogram * torch.arange(self.time_steps + 1)).sum())
            rate, shares = spikes / (total * self.time_steps), (histogram / total).tolist()
            found.append({"name": name, "size": total // images, "rate": rate, "histogram": shares})
        return found


def _accuracy(
    trained: nn.Module,
    spiking: SpikingNetwork,
    loader: Iterable[Any],
    max_images: int | None,
    activity: Activity | None,
    progress: bool,
) -> dict[str, Any]:
    lossless = all(neuron.delay >= spiking.time_steps - 1 for neuron in spiking.neurons().values())
    images = right_trained = right_spiking = same = 0
    for batch, labels in image_batches(loader, trained, max_images, "accuracy" if progress else None):
        if labels is None:
            raise QsdError("the images have no labels, so no accuracy can be measured; give batches (images, labels).")
        with spiking.runtime.counting(activity or (lambda _name, _counts: None)):
            logits = spiking(batch) if lossless else spiking.simulate(batch).logits
        classes, expected = logits.argmax(1), trained(batch).argmax(1)
        images += len(batch)
        right_trained += int((expected == labels).sum())
        right_spiking += int((classes == labels).sum())
        same += int((classes == expected).sum())
    return {
        "images": images,
        "quantized": right_trained / images,
        "spiking": right_spiking / images,
        "class_agreement": same / images,
        "way": "count" if lossless else "simulate",
        "dtype": str(next(trained.parameters()).dtype).removeprefix("torch."),
    }


def _comparison(
    trained: nn.Module, convert: Callable[[nn.Module], SpikingNetwork], loader: Iterable[Any], **limits: Any
) -> list[dict[str, Any]]:
    """Counts and classes in float64, both ways, and in float32, at the lossless delay."""
    found = []
    ways: tuple[Literal["count", "simulate"], ...]
    for dtype, ways in ((torch.float64, ("count", "simulate")), (torch.float32, ("count",))):
        network = copy.deepcopy(trained).to(dtype)
        spiking = convert(network)
        found += [
            compare_counts(network, spiking, loader, way, limits[way], limits["progress"]).to_dict() for way in ways
        ]
    return found


def _delays(
    trained: nn.Module, spiking: SpikingNetwork, loader: Iterable[Any], stepped: int, progress: bool
) -> dict[str, Any]:
    """Accuracy and class agreement for every delay from 0 to T - 1, the same for all neurons."""
    steps = spiking.time_steps
    images = right_trained = 0
    right, same = [0] * steps, [0] * steps
    for batch, labels in image_batches(loader, trained, stepped, "delays" if progress else None):
        expected = trained(batch).argmax(1)
        images += len(batch)
        right_trained += int((expected == labels).sum())
        for delay in range(steps):
            classes = spiking.simulate(batch, delay=delay).logits.argmax(1)
            right[delay] += int((classes == labels).sum())
            same[delay] += int((classes == expected).sum())
    rows = [
        {
            "delay": delay,
            "accuracy": right[delay] / images,
            "class_agreement": same[delay] / images,
            "latency": spiking.latency(delay),
            "interval": spiking.interval(delay),
        }
        for delay in range(steps)
    ]
    return {"images": images, "quantized_accuracy": right_trained / images, "rows": rows}


def _raster(spiking: SpikingNetwork, loader: Iterable[Any], name: str | None) -> dict[str, Any]:
    names = list(spiking.neurons())
    if name is None:
        name = next((n for n in reversed(names) if n.endswith("q_neuron")), names[-1])
    (images, _), *_ = image_batches(loader, spiking, _RASTER_IMAGES)
    spikes = spiking.simulate(images, record=name).spikes[name].flatten(2).transpose(0, 1)  # [B, T, neurons]
    neurons = spikes.shape[2]
    chosen = torch.linspace(0, neurons - 1, min(neurons, _RASTER_NEURONS)).long()
    return {"name": name, "neurons": neurons, "spikes": spikes[:, :, chosen].int().tolist()}


def weight_bits(trained: nn.Module) -> str:
    """Bits of a network's weights, in words.

    Args:
        trained: quantized or float.
    """
    bits = sorted({m.bits for m in trained.modules() if isinstance(m, StepSizeQuantizer)})
    return ", ".join(map(str, bits)) or "32"
