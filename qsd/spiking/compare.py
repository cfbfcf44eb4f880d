"""How far two forms of one network agree: counts, classes, and why a count differs."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qsd.layers.wrappers import unwrapped
from qsd.neurons import SpikeNeuron
from qsd.precision import full_float32
from qsd.spiking.batches import Images, image_batches
from qsd.spiking.counts import named_calls, watch_neurons
from qsd.spiking.network import SpikingNetwork


@dataclass
class Comparison:
    """Agreement of a trained network and its spiking form.

    Attributes:
        dtype: Number format of both.
        way: ``"count"`` domain, or ``"simulate"`` at the lossless delay.
        images: Number of images.
        changed_images: Images with another count at any neuron.
        equal_classes: Images of the same class.
        farthest_first_difference: Distance from a threshold, in thresholds, of the neurons at which an image's counts
            begin to differ; the largest over all images, ``None`` if none differ. Where rounding alone is the cause it
            is tiny.
    """

    dtype: str
    way: Literal["count", "simulate"]
    images: int = 0
    changed_images: int = 0
    equal_classes: int = 0
    farthest_first_difference: float | None = None

    @property
    def equal_counts(self) -> bool:
        """Whether all counts of all neurons are equal."""
        return self.changed_images == 0

    @property
    def class_agreement(self) -> float:
        """Share of images of the same class, 0 to 1."""
        return self.equal_classes / self.images

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {**asdict(self), "equal_counts": self.equal_counts, "class_agreement": self.class_agreement}


@torch.no_grad()
@full_float32()
def compare_counts(
    trained: nn.Module,
    spiking: SpikingNetwork,
    images: Images,
    way: Literal["count", "simulate"] = "count",
    max_images: int | None = None,
    progress: bool = False,
) -> Comparison:
    """Run a trained network and its spiking form on real images and compare every neuron's count and the class.

    In float64 both are equal. In float32 a membrane potential within rounding error of a threshold may be rounded to
    the other side, which changes the count and, with it, counts downstream: `Comparison.farthest_first_difference`
    shows that nothing else is the cause.

    Args:
        trained: The trained network, in evaluation; compared in the number format of its parameters.
        spiking: The spiking network converted from it, in the same format.
        images: ``[B, C, H, W]``, or a data loader.
        way: Count domain, or simulation at the lossless delay.
        max_images: Largest number of images.
        progress: Whether to show a progress bar.
    """
    trained = unwrapped(trained)
    comparison = Comparison("", way)
    title = f"compare ({way})" if progress else None
    for batch, _ in image_batches(images, spiking, max_images, title):
        counts: dict[str, Tensor] = {}
        with watch_neurons(trained, counts_and_drives) as calls:
            expected = trained(batch)
        with spiking.runtime.counting(counts):
            logits = spiking(batch) if way == "count" else spiking.simulate(batch, spiking.lossless_delay).logits
        comparison.dtype = str(batch.dtype).removeprefix("torch.")
        comparison.images += len(batch)
        comparison.equal_classes += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        _explain(comparison, named_calls(calls), counts, spiking.frames)
    return comparison


def counts_and_drives(neuron: SpikeNeuron, *inputs: Any) -> tuple[Tensor, Tensor]:
    """The counts of a trained neuron by its own rule, and its input in units of the threshold.

    Args:
        neuron: The neuron.
        inputs: Its inputs.
    """
    return neuron.counts(*inputs), neuron.potential(*inputs)


def distance_to_threshold(drive: Tensor) -> float:
    """The largest distance of some neurons from a threshold, in thresholds.

    Args:
        drive: Their input in units of the threshold, in any shape, not empty.
    """
    above = drive + 0.5  # thresholds lie at odd multiples of half a step
    return float((above - above.round()).abs().max())


def _explain(
    comparison: Comparison, calls: dict[str, tuple[Tensor, Tensor]], counts: dict[str, Tensor], frames: int
) -> None:
    """Find each image's first neuron (in the order of execution) that differs, and how far it is from a threshold.

    Of a recording the first frame in which that neuron differs is looked at: a memory carries the difference on.
    """
    changed: Tensor | None = None
    for name, (expected, potential) in calls.items():
        different = (expected != counts[name]).unflatten(0, (frames, -1)).flatten(2)  # [F, B, neurons]
        changed = different.new_zeros(different.shape[1]) if changed is None else changed
        in_frame = different.any(2)
        first = in_frame.any(0) & ~changed
        if bool(first.any()):
            earliest = (in_frame.cumsum(0) == 1) & in_frame & first
            drive = potential.unflatten(0, (frames, -1)).flatten(2)
            distance = distance_to_threshold(drive[earliest][different[earliest]])
            comparison.farthest_first_difference = max(distance, comparison.farthest_first_difference or 0.0)
        changed |= first
    comparison.changed_images += 0 if changed is None else int(changed.sum())
