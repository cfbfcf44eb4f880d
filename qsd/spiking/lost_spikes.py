"""The cost of lost spikes: random spikes are deleted on their way, and the network's output is compared.

A spike of the unary code carries one unit of a count. A spike of the binary code carries 1, 2, 4, ... units, so that
the loss of a first digit changes a count more.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from qsd.errors import QsdError
from qsd.precision import full_float32
from qsd.spiking.batches import Images, image_batches
from qsd.spiking.layers import DelayedNeuron
from qsd.spiking.network import SpikingNetwork
from qsd.spiking.results import Trace
from qsd.spiking.signals import MarkedTensor, plain


@dataclass
class LossRow:
    """The cost of lost spikes with one probability.

    Attributes:
        share: Probability that a spike is lost.
        lost: Lost spikes per image.
        accuracy: Accuracy with the losses, 0 to 1.
        agreement: Share of images with the class of the lossless network.
        logit_error: Root mean square change of the logits over their deviation.
        count_error: Mean absolute change of a neuron's count.
    """

    share: float
    lost: float
    accuracy: float
    agreement: float
    logit_error: float
    count_error: float


@dataclass
class LostSpikes:
    """Findings of `measure_lost_spikes`.

    Attributes:
        code: Code of the network.
        images: Number of images.
        labelled: Whether accuracies are shares of right classes; else of the lossless network's classes.
        accuracy: Accuracy without losses.
        spikes: Spikes per image that all neurons fire without losses.
        units: Mean part of a count that one spike carries: 1 in the unary code.
        rows: One for each probability.
    """

    code: str
    images: int
    labelled: bool
    accuracy: float
    spikes: float
    units: float
    rows: list[LossRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)

    def table(self) -> Table:
        """A table for the terminal."""
        title = (
            f"Lost spikes in the {self.code} code on {self.images} images: {self.spikes:.4g} spikes per image of "
            f"{self.units:.2f} units each, accuracy {100 * self.accuracy:.2f} % without losses"
        )
        table = Table("lost", "per image", "accuracy", "same class", "logits", "counts", title=title)
        for row in self.rows:
            shares = [f"{100 * share:.2f} %" for share in (row.accuracy, row.agreement)]
            table.add_row(f"{100 * row.share:g} %", f"{row.lost:.4g}", *shares, f"{row.logit_error:.3g}",
                          f"{row.count_error:.3g}")  # fmt: skip
        return table


@torch.no_grad()
@full_float32()
def measure_lost_spikes(
    spiking: SpikingNetwork,
    images: Images,
    shares: Sequence[float] = (0.001, 0.01, 0.1),
    max_images: int | None = None,
    seed: int = 0,
) -> LostSpikes:
    """Delete random spikes of all neurons and measure what changes, step by step through time.

    Args:
        spiking: The converted network, of either code; it is not changed.
        images: ``[B, C, H, W]``, or a data loader; with labels accuracy is that of the classes, else the share of the
            lossless network's classes that stay.
        shares: Probabilities from 0 to 1 that a spike is lost on its way.
        max_images: Largest number of images.
        seed: Seed of the losses.

    Raises:
        QsdError: If a probability is none, or there are no images.
    """
    for share in shares:
        if not 0 <= share <= 1:
            raise QsdError(f"share={share} is no probability from 0 to 1.")
    batches = list(image_batches(images, spiking, max_images))
    labelled, number = all(labels is not None for _, labels in batches), sum(len(batch) for batch, _ in batches)
    lossless = [spiking.simulate(batch) for batch, _ in batches]
    expected = torch.cat([trace.logits for trace in lossless])
    labels = torch.cat([t for _, t in batches if t is not None]) if labelled else expected.argmax(-1)
    counts = [count for trace in lossless for count in trace.counts.values()]
    units = sum(int(count.sum(dtype=torch.int64)) for count in counts)
    spikes = sum(int(spiking.code.ones(count).sum(dtype=torch.int64)) for count in counts)
    accuracy = float((expected.argmax(-1) == labels).double().mean())
    found = LostSpikes(spiking.code.name, number, labelled, accuracy, spikes / number, units / max(1, spikes))
    for share in shares:
        generator = torch.Generator(expected.device).manual_seed(seed)
        with _losing(spiking, share, generator) as lost:
            traces = [spiking.simulate(batch) for batch, _ in batches]
        logits = torch.cat([trace.logits for trace in traces])
        error = _count_error(traces, lossless)
        found.rows.append(_row(share, sum(lost) / number, logits, expected, labels, error))
    return found


def _row(share: float, lost: float, logits: Tensor, expected: Tensor, labels: Tensor, count_error: float) -> LossRow:
    classes = logits.argmax(-1)
    error = (logits - expected).square().mean().sqrt() / expected.std().clamp(min=1e-12)
    return LossRow(
        share=share,
        lost=lost,
        accuracy=float((classes == labels).double().mean()),
        agreement=float((classes == expected.argmax(-1)).double().mean()),
        logit_error=float(error),
        count_error=count_error,
    )


@contextmanager
def _losing(spiking: SpikingNetwork, share: float, generator: torch.Generator) -> Iterator[list[int]]:
    """Delete spikes of all neurons in time steps; yields the numbers of lost ones."""
    lost: list[int] = []

    def lose(neuron: DelayedNeuron, _inputs: Any, output: Tensor) -> Tensor | None:
        if neuron.runtime.mode != "step":
            return None
        spikes = plain(output)
        deleted = torch.rand(spikes.shape, generator=generator, device=spikes.device) < share
        lost.append(int((deleted & (spikes != 0)).sum()))
        assert isinstance(output, MarkedTensor)
        return MarkedTensor.mark(spikes.masked_fill(deleted, 0.0), output.source, output.arrival, output.runtime)

    handles = [neuron.register_forward_hook(lose) for neuron in spiking.neurons().values()]
    try:
        yield lost
    finally:
        for handle in handles:
            handle.remove()


def _count_error(traces: Sequence[Trace], lossless: Sequence[Trace]) -> float:
    changed = neurons = 0
    for trace, expected in zip(traces, lossless):
        for name, counts in trace.counts.items():
            changed += int((counts.int() - expected.counts[name].int()).abs().sum())
            neurons += counts.numel()
    return changed / neurons
