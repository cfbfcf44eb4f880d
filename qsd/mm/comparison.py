"""How far a trained detector or segmenter and its spiking form agree, scene by scene."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from rich.progress import track
from torch import Tensor

from qsd.mm.conversion import Batch, SpikingModel, predict
from qsd.spiking.compare import Comparison, distance_to_threshold, full_float32
from qsd.spiking.counts import watch_neurons

# What a prediction holds, and is compared by: the first are equal or not, of the others the largest difference counts.
_LABELS = ("labels", "masks", "sem_seg")
_ROUNDING = 1e-4  # steps from a threshold, up to which float32 can be the cause


@dataclass
class SceneComparison(Comparison):
    """Agreement on scenes. Of equal classes are those with the same classes, masks or segments everywhere.

    Attributes:
        largest_difference: of coordinates of boxes (in pixels), of scores, or of a segmenter's logits; ``None`` if a
            scene has another number of objects.
        other_regions: scenes whose first change lies behind the choice of regions: sums that differ by rounding alone
            led to other regions, or to another order. They are not in ``farthest_first_difference``.
    """

    largest_difference: float | None = 0.0
    other_regions: int = 0


@torch.no_grad()
@full_float32()
def compare_model(
    trained: Any,
    spiking: SpikingModel,
    batches: Iterable[Batch],
    way: Literal["count", "simulate"] = "count",
    progress: bool = False,
) -> SceneComparison:
    """Run a trained model and its spiking form on scenes and compare every neuron's count and every prediction.

    Args:
        trained: in evaluation; compared in the number format of its parameters.
        spiking: converted from it, in the same format.
        batches: of one scene each, so that each is judged alone.
        way: count domain, or simulation at delay T - 1.
        progress: show a progress bar.
    """
    comparison = SceneComparison(str(next(trained.parameters()).dtype).removeprefix("torch."), way)
    title = f"compare ({comparison.dtype}, {way})"
    for batch in batches if not progress else track(batches, title, transient=True):
        counts: dict[str, list[Tensor]] = {}
        with watch_neurons(trained, lambda neuron, *inputs: neuron.drive(*inputs)) as drives:
            (expected,) = predict(trained, batch)
        with spiking.counting(partial(_keep, counts)):
            if way == "count":
                (found,) = spiking.predict(batch)
            else:
                (found,) = spiking.simulate(batch, spiking.time_steps - 1).samples
        comparison.images += 1
        _compare_counts(comparison, drives, counts, spiking.time_steps)
        _compare_predictions(comparison, dict(_contents(expected)), dict(_contents(found)))
    return comparison


def _keep(found: dict[str, list[Tensor]], call: str, counts: Tensor) -> None:
    """Counts by neuron, in the order of its calls."""
    found.setdefault(call.partition("@")[0], []).append(counts)


def _compare_counts(
    comparison: SceneComparison, drives: list[tuple[str, Tensor]], counts: dict[str, list[Tensor]], time_steps: int
) -> None:
    """Find the scene's first neuron (in the order of the trained model's execution) that differs, if any."""
    calls = {name: iter(found) for name, found in counts.items()}
    for name, drive in drives:
        count = next(calls.get(name, iter(())), None)
        expected = (drive + 0.5).floor().clamp(0, time_steps)
        if count is None or count.shape != expected.shape or not torch.equal(count, expected):
            comparison.changed_images += 1
            alike = count is not None and count.shape == expected.shape
            distance = distance_to_threshold(drive[expected != count]) if alike else 1.0
            if name.startswith("roi_head.") and distance > _ROUNDING:
                comparison.other_regions += 1
            else:
                comparison.farthest_first_difference = max(distance, comparison.farthest_first_difference or 0.0)
            return


def _contents(sample: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a prediction, by name."""
    for part in ("pred_instances", "pred_sem_seg", "seg_logits"):
        data = getattr(sample, part, None)
        for key, value in () if data is None else data.items():
            yield (key if part == "pred_instances" else part.removeprefix("pred_")), torch.as_tensor(value)


def _compare_predictions(
    comparison: SceneComparison, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    same = True
    for key, value in expected.items():
        if value.shape != found[key].shape:
            comparison.largest_difference, same = None, False
        elif key in _LABELS:
            same = same and torch.equal(value, found[key])
        elif value.numel() and comparison.largest_difference is not None:
            difference = float((value - found[key]).abs().max())
            comparison.largest_difference = max(comparison.largest_difference, difference)
    comparison.equal_classes += same
