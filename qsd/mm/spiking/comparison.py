"""Agreement of a trained detector or segmenter and its spiking form, image by image."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from rich.progress import track
from torch import Tensor

from qsd.mm.spiking.model import Batch, ConvertedModel, predict
from qsd.precision import full_float32
from qsd.spiking.compare import Comparison, counts_and_drives, distance_to_threshold
from qsd.spiking.counts import watch_neurons

# Parts of a prediction that are equal or not; for all other parts the largest difference counts.
_LABELS = ("labels", "masks", "sem_seg")
_ROUNDING = 1e-4  # steps: the largest distance from a threshold that rounding in float32 explains


@dataclass
class DetectionComparison(Comparison):
    """Agreement on images; ``equal_classes`` counts those with the same classes, masks or segments everywhere.

    Attributes:
        largest_difference: Largest difference of box coordinates (in pixels), of scores, or of a segmenter's logits;
            ``None`` if an image has another number of objects.
        other_regions: Images whose spike counts first differ after the choice of regions: sums that differ by rounding
            alone led to other regions, or to another order. ``farthest_first_difference`` leaves them out.
    """

    largest_difference: float | None = 0.0
    other_regions: int = 0


@torch.no_grad()
@full_float32()
def compare_model(
    trained: Any,
    spiking: ConvertedModel,
    batches: Iterable[Batch],
    way: Literal["count", "simulate"] = "count",
    progress: bool = False,
) -> DetectionComparison:
    """Run a trained model and its spiking form on images and compare every spike count and every prediction.

    Args:
        trained: Trained model in evaluation; compared in the floating-point type of its parameters.
        spiking: Converted from it, in the same type.
        batches: Batches of one image each, so that images are judged one by one.
        way: Count domain, or simulation with the lossless delay.
        progress: Whether to show a progress bar.
    """
    comparison = DetectionComparison(str(next(trained.parameters()).dtype).removeprefix("torch."), way)
    title = f"compare ({comparison.dtype}, {way})"
    for batch in batches if not progress else track(batches, title, transient=True):
        counts: dict[str, list[Tensor]] = {}
        with watch_neurons(trained, counts_and_drives) as calls:
            (expected,) = predict(trained, batch)
        with spiking.counting(partial(_append, counts)):
            if way == "count":
                (found,) = spiking.predict(batch)
            else:
                (found,) = spiking.simulate(batch, spiking.lossless_delay).samples
        comparison.images += 1
        _compare_counts(comparison, calls, counts)
        _compare_predictions(comparison, contents(expected), contents(found))
    return comparison


def contents(sample: Any) -> dict[str, Tensor]:
    """Tensors of a prediction, by name.

    Args:
        sample: Data sample of mmdet or mmseg.
    """
    return dict(_contents(sample))


def _append(found: dict[str, list[Tensor]], call: str, counts: Tensor) -> None:
    """Collect spike counts by neuron layer, in the order of its calls."""
    found.setdefault(call.partition("@")[0], []).append(counts)


def _compare_counts(
    comparison: DetectionComparison,
    trained: list[tuple[str, tuple[Tensor, Tensor]]],
    counts: dict[str, list[Tensor]],
) -> None:
    """Find the first neuron layer of the image, in the order of the trained model's execution, that differs."""
    calls = {name: iter(found) for name, found in counts.items()}
    for name, (expected, drive) in trained:
        count = next(calls.get(name, iter(())), None)
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
    for part in ("pred_instances", "pred_sem_seg", "seg_logits"):
        data = getattr(sample, part, None)
        for key, value in () if data is None else data.items():
            yield (key if part == "pred_instances" else part.removeprefix("pred_")), torch.as_tensor(value)


def _compare_predictions(
    comparison: DetectionComparison, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
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
