"""Short delays where they cost nothing: the smallest delay of every neuron layer within an accuracy budget.

The method is this package's own.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from qsd.errors import QsdError
from qsd.precision import full_float32
from qsd.spiking.batches import Images, image_batches
from qsd.spiking.network import SpikingNetwork


@dataclass
class LayerCost:
    """The loss if one neuron layer alone fires early.

    Attributes:
        neuron: Dotted name.
        delay: Delay of the neuron.
        accuracy: Accuracy with it, 0 to 1.
        agreement: Share of images with the class of the lossless network.
        logit_error: Root mean square change of the logits over their deviation.
    """

    neuron: str
    delay: int
    accuracy: float
    agreement: float
    logit_error: float


@dataclass
class Calibration:
    """Delays by neuron, and the measurements that they were chosen by.

    Attributes:
        delays: Delays by dotted name; pass them to `to_spike_driven` or `SpikingNetwork.simulate`, or call `apply`.
        accuracy: Accuracy with them, on the images of the calibration.
        lossless_accuracy: Accuracy at T - 1 everywhere.
        latency: Latency with them, in time steps.
        lossless_latency: Latency at T - 1 everywhere.
        images: Number of images.
        labelled: Whether accuracies are shares of right classes; else of the lossless network's classes.
        costs: Loss of every layer and delay alone.
    """

    delays: dict[str, int]
    accuracy: float
    lossless_accuracy: float
    latency: int
    lossless_latency: int
    images: int
    labelled: bool
    costs: list[LayerCost] = field(default_factory=list)

    def apply(self, spiking: SpikingNetwork) -> None:
        """Store the delays in a network's neurons.

        Args:
            spiking: The network that was calibrated, or another one whose neurons have the same names.
        """
        for name, neuron in spiking.neurons().items():
            neuron.delay = self.delays.get(name, neuron.delay)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)

    def table(self) -> Table:
        """A table for the terminal: the accuracy with every layer early alone, and the chosen delays."""
        tried = sorted({cost.delay for cost in self.costs})
        title = (
            f"Delays on {self.images} images: accuracy {100 * self.lossless_accuracy:.2f} % to "
            f"{100 * self.accuracy:.2f} %, latency {self.lossless_latency} to {self.latency} steps"
        )
        table = Table("neuron", *(f"alone at {delay}" for delay in tried), "chosen", title=title)
        rows: dict[str, list[str]] = {}
        for cost in self.costs:
            rows.setdefault(cost.neuron, []).append(f"{100 * cost.accuracy:.2f} %")
        for name, cells in rows.items():
            table.add_row(escape(name), *cells, str(self.delays[name]))
        return table


@torch.no_grad()
@full_float32()
def calibrate_delays(
    spiking: SpikingNetwork,
    images: Images,
    max_accuracy_drop: float = 0.0,
    max_images: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Find small delays by layer by measurement.

    First every neuron layer fires early alone, at every delay below T - 1. Then the choices are made together, the
    least harmful first, as long as the accuracy that they have together stays within the budget. Measure on images
    that are neither for training nor for the final test.

    Args:
        spiking: The converted network; it is not changed.
        images: ``[B, C, H, W]``, or a data loader; with labels accuracy is that of the classes, else the share of the
            lossless network's classes that stay.
        max_accuracy_drop: Share of images, 0 to 1, that may be lost.
        max_images: Largest number of images.
        progress: Whether to show a progress bar.

    Raises:
        QsdError: If the budget is no share, there are no images, or neurons of the network's code cannot fire early.
    """
    if not 0 <= max_accuracy_drop <= 1:
        raise QsdError(f"max_accuracy_drop={max_accuracy_drop} is no share of images from 0 to 1.")
    names, lossless = list(spiking.neurons()), spiking.lossless_delay
    for name in names:
        spiking.code.check_delay(name, 0)
    batches = list(image_batches(images, spiking, max_images))
    measured = _Measure(spiking, batches, dict.fromkeys(names, lossless))
    choices = [(name, delay) for name in names for delay in range(lossless)]
    all_lossless, accuracy = dict.fromkeys(names, lossless), measured.reference
    count, latency = sum(len(batch) for batch, _ in batches), spiking.latency(lossless)
    calibration = Calibration(all_lossless, accuracy, accuracy, 0, latency, count, measured.labelled)
    least = accuracy - max_accuracy_drop
    with Progress(transient=True, disable=not progress) as bar:
        for name, delay in bar.track(choices, description="layers alone"):
            calibration.costs.append(LayerCost(name, delay, *measured({**all_lossless, name: delay})))
        order = sorted(calibration.costs, key=lambda cost: (cost.logit_error, cost.delay))
        task = bar.add_task("together", total=None)
        chosen = _together(order, calibration, measured, least, lambda: bar.advance(task))
    calibration.delays, calibration.accuracy = chosen, measured(chosen)[0]
    calibration.latency = spiking.latency(chosen)
    return calibration


def _together(
    order: list[LayerCost], calibration: Calibration, measured: "_Measure", least: float, advance: Any
) -> Any:
    """The longest run of least harmful choices that fits, and then whatever single choice still fits."""

    def with_first(count: int) -> dict[str, int]:
        delays = dict(calibration.delays)
        for cost in order[:count]:
            delays[cost.neuron] = min(delays[cost.neuron], cost.delay)
        return delays

    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        advance()
        low, high = (middle, high) if measured(with_first(middle))[0] >= least else (low, middle - 1)
    delays = with_first(low)
    for cost in order[low:]:
        if cost.accuracy >= least and cost.delay < delays[cost.neuron]:
            advance()
            tried = {**delays, cost.neuron: cost.delay}
            delays = tried if measured(tried)[0] >= least else delays
    return delays


class _Measure:
    """Accuracy, agreement and change of the logits with given delays."""

    def __init__(
        self, spiking: SpikingNetwork, batches: list[tuple[Tensor, Tensor | None]], lossless: dict[str, int]
    ) -> None:
        self.spiking, self.batches = spiking, batches
        self.labelled = all(labels is not None for _, labels in batches)
        self.expected = self._logits(lossless)
        classes = self.expected.argmax(-1)
        self.labels = torch.cat([t for _, t in batches if t is not None]) if self.labelled else classes
        self.reference = float((classes == self.labels).double().mean())

    def __call__(self, delays: dict[str, int]) -> tuple[float, float, float]:
        logits = self._logits(delays)
        classes = logits.argmax(-1)
        accuracy = float((classes == self.labels).double().mean())
        agreement = float((classes == self.expected.argmax(-1)).double().mean())
        error = (logits - self.expected).square().mean().sqrt() / self.expected.std().clamp(min=1e-12)
        return accuracy, agreement, float(error)

    def _logits(self, delays: dict[str, int]) -> Tensor:
        return torch.cat([self.spiking.simulate(images, delays).logits for images, _ in self.batches])
