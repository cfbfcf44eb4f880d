r"""The information that the spikes of attention carry about the membranes of their neurons.

QSD-Transformer's argument for multi-level spikes and for distillation is that low-bit queries, keys and values are
distributed badly and lose information ("spike information distortion"). Its propositions are not public; these
measurements are ours. For every attention layer and each of query, key and value:

- the membrane, in units of the input that fires T spikes: mean, deviation, histogram, bimodality;
- the spike count: the same quantities, its firing rate (mean count over T), its entropy
  :math:`H(n) = -\sum_i p_i \log_2 p_i` against the most that T spikes can have, :math:`\log_2(T + 1)`;
- the part of the membrane that the count keeps: the mutual information of both (the membrane in bins of 1/16) over the
  membrane's entropy in these bins, and the share of the membrane's variance that the count explains;
- the distance of the token similarities from those of a teacher (`qsd.distillation`).

Bimodality is Sarle's coefficient, ``(skewness^2 + 1) / kurtosis``: 5/9 for a uniform distribution, 1/3 for a normal
one, 1 for two equal points. More than 5/9 hints at two modes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from math import inf, log2, nan
from typing import Any

import torch
from torch import Tensor, nn

from qsd.distillation import (
    PROJECTIONS,
    AttentionMaps,
    AttentionRecorder,
    Teacher,
    attention_distances,
    attention_layers,
)
from qsd.errors import QsdError
from qsd.neurons import SpikeNeuron
from qsd.precision import full_float32

# Membranes are counted in bins of 1/16 from -4 to 5 times the input that fires T spikes; values outside of this range
# are counted in the outermost bins.
LOWEST, HIGHEST, BINS_PER_UNIT = -4, 5, 16
BINS = (HIGHEST - LOWEST) * BINS_PER_UNIT


@dataclass(frozen=True)
class Distribution:
    """Statistics of membranes or spike counts.

    Attributes:
        mean: Mean of all values.
        deviation: Standard deviation.
        bimodality: Sarle's coefficient; NaN if all values are equal.
        histogram: Numbers of membranes by bin (`LOWEST`, `HIGHEST`, `BINS_PER_UNIT`), or of counts 0, 1, ... T.
    """

    mean: float
    deviation: float
    bimodality: float
    histogram: list[int]


@dataclass(frozen=True)
class Signal:
    """Query, key or value of one attention layer, over all images.

    Attributes:
        layer: Dotted name of the attention layer.
        projection: ``"query"``, ``"key"`` or ``"value"``.
        time_steps: T, or ``None`` in a float network, whose outputs are no counts.
        membrane: Input of the neuron, in units of the input that fires T spikes (of 1 in a float network).
        counts: Spikes per image, 0 to T; ``None`` in a float network, and so are the rest.
        firing_rate: Mean count over T.
        entropy: Entropy of the counts, in bits.
        max_entropy: ``log2(T + 1)`` bits.
        kept_information: Mutual information of counts and binned membranes over the entropy of the latter, 0 to 1.
        kept_variance: Share of the membrane's variance that the counts explain, 0 to 1.
        silent_heads: Share of heads and images in which no neuron fires.
        teacher_distance: Mean distance to the teacher's token similarity, 0 to 2; ``None`` without a teacher.
    """

    layer: str
    projection: str
    time_steps: int | None
    membrane: Distribution
    counts: Distribution | None = None
    firing_rate: float | None = None
    entropy: float | None = None
    max_entropy: float | None = None
    kept_information: float | None = None
    kept_variance: float | None = None
    silent_heads: float | None = None
    teacher_distance: float | None = None


@dataclass(frozen=True)
class Information:
    """Findings of `measure_information`.

    Attributes:
        images: Number of images.
        accuracy: Share of images that were classified right; ``None`` without labels.
        signals: One for every attention layer and projection, in the network's order.
    """

    images: int
    accuracy: float | None
    signals: list[Signal]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, for JSON; undefined values are ``None``."""
        return _without_nan(asdict(self))


class SignalMeter:
    """Running sums from which a `Signal` follows. They add up over batches and processes.

    Args:
        time_steps: T, or ``None`` in a float network.
        heads: Number of heads of the attention layer.
    """

    def __init__(self, time_steps: int | None, heads: int) -> None:
        self.time_steps, self.heads = time_steps, heads
        self.reset()

    def reset(self) -> None:
        """Set all sums to zero."""
        levels = (self.time_steps or 0) + 1
        self.joint = torch.zeros(BINS, levels, dtype=torch.int64)  # membranes' bins by counts
        self.powers = torch.zeros(5, dtype=torch.float64)  # sums of the membrane's powers 0 to 4
        self.by_count = torch.zeros(levels, dtype=torch.float64)  # sums of the membrane, by count
        self.silent = torch.zeros(2, dtype=torch.float64)  # number of silent heads, and of all heads

    def update(self, membrane: Tensor, counts: Tensor | None) -> None:
        """Add a batch.

        Args:
            membrane: ``[B, C, H, W]``, in units of the input that fires T spikes.
            counts: ``[B, C, H, W]``, or ``None`` in a float network.
        """
        device, levels = membrane.device, self.joint.shape[1]
        x = membrane.double().flatten()
        bins = ((x - LOWEST) * BINS_PER_UNIT).long().clamp_(0, BINS - 1)
        level = torch.zeros_like(bins) if counts is None else counts.long().flatten()
        cells = torch.bincount(bins * levels + level, minlength=BINS * levels)
        self.joint = self.joint.to(device) + cells.view(BINS, levels)
        self.powers = self.powers.to(device) + torch.stack([x.pow(k).sum() for k in range(5)])
        self.by_count = self.by_count.to(device) + torch.bincount(level, x, minlength=levels)
        if counts is not None:
            active = counts.unflatten(1, (self.heads, -1)).flatten(2).any(dim=2)
            self.silent = self.silent.to(device) + torch.stack([(~active).sum(), torch.ones_like(active).sum()])

    def reduce(self, add_over_processes: Callable[[Tensor], Tensor]) -> None:
        """Add the images of the other processes.

        Args:
            add_over_processes: Gives the sum of a tensor over all processes.
        """
        for name in ("joint", "powers", "by_count", "silent"):
            setattr(self, name, add_over_processes(getattr(self, name)))

    def signal(self, layer: str, projection: str, teacher_distance: float | None = None) -> Signal:
        """The statistics of all images up to now.

        Args:
            layer: Dotted name of the attention layer.
            projection: ``"query"``, ``"key"`` or ``"value"``.
            teacher_distance: Mean distance to the teacher's token similarity.
        """
        joint, powers = self.joint.cpu(), self.powers.cpu()
        membrane = _distribution((powers[1:] / powers[0].clamp(min=1)).tolist(), joint.sum(1).tolist())
        if self.time_steps is None:
            return Signal(layer, projection, None, membrane, teacher_distance=teacher_distance)
        steps, numbers = self.time_steps, joint.sum(0)
        levels = torch.arange(steps + 1, dtype=torch.float64)
        total = numbers.sum().clamp(min=1)
        moments = [float((numbers * levels**k).sum() / total) for k in range(1, 5)]
        of_counts, of_membrane = _entropy(numbers), _entropy(joint.sum(1))
        shared = of_counts + of_membrane - _entropy(joint.flatten())
        explained = (self.by_count.cpu().square() / numbers.clamp(min=1)).sum() / total - membrane.mean**2
        silent, heads = self.silent.tolist()
        return Signal(
            layer,
            projection,
            steps,
            membrane,
            _distribution(moments, numbers.tolist()),
            firing_rate=moments[0] / steps,
            entropy=of_counts,
            max_entropy=log2(steps + 1),
            kept_information=shared / of_membrane if of_membrane > 0 else nan,
            kept_variance=float(explained) / membrane.deviation**2 if membrane.deviation > 0 else nan,
            silent_heads=silent / heads if heads else nan,
            teacher_distance=teacher_distance,
        )


class InformationMeter:
    """A `SignalMeter` on each query, key and value neuron of a network.

    Args:
        model: A network with named attention taps.
    """

    def __init__(self, model: nn.Module) -> None:
        self.meters: dict[tuple[str, str], SignalMeter] = {}
        self._handles = []
        for name, layer in attention_layers(model).items():
            for projection in PROJECTIONS:
                neuron = getattr(layer, f"{projection[0]}_neuron")
                steps = neuron.time_steps if isinstance(neuron, SpikeNeuron) else None
                meter = self.meters[name, projection] = SignalMeter(steps, layer.num_heads)
                self._handles.append(neuron.register_forward_hook(self._hook(meter)))

    def _hook(self, meter: SignalMeter) -> Callable[..., None]:
        def hook(neuron: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            with torch.no_grad():
                if isinstance(neuron, SpikeNeuron):
                    meter.update(neuron.potential(*inputs) / neuron.time_steps, neuron.counts(*inputs))
                else:
                    meter.update(inputs[0], None)

        return hook

    def signals(self, distances: dict[tuple[str, str], float] | None = None) -> list[Signal]:
        """The statistics of all neurons, in the network's order.

        Args:
            distances: Distances to a teacher, by layer and projection.
        """
        found = distances or {}
        return [meter.signal(*key, teacher_distance=found.get(key)) for key, meter in self.meters.items()]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
@full_float32()
def measure_information(
    model: nn.Module,
    batches: Iterable[Any],
    teacher: Teacher | None = None,
    statistics: Any = None,
    max_images: float = inf,
) -> Information:
    """Measure the information that the spikes of attention carry about the membranes of their neurons.

    Args:
        model: A network with named attention taps: ours, spiking or float. It is evaluated, and left as it was.
        batches: Images ``[B, C, H, W]``, alone or with labels ``[B]``, such as a data loader.
        teacher: Network to compare token similarities with.
        statistics: Mean and standard deviation by which the images were normalised, if the teacher needs them.
        max_images: Number of images, rounded up to whole batches.

    Raises:
        QsdError: If the network has no such attention, or there are no images.
    """
    if not attention_layers(model):
        what = type(model).__name__
        raise QsdError(f"{what} has no attention with q_neuron, k_neuron and v_neuron: nothing can be measured.")
    device = next(model.parameters()).device
    distances: dict[tuple[str, str], float] = defaultdict(float)
    images_seen, hits = 0, 0.0
    attached = _attached(InformationMeter(model)), _attached(AttentionRecorder(model))
    with _evaluated(model), attached[0] as meter, attached[1] as recorder:
        for batch in batches:
            images, labels = batch if isinstance(batch, tuple | list) else (batch, None)
            images = images.to(device)
            images_seen += len(images)
            recorder.start()
            logits = model(images)
            hits = nan if labels is None else hits + float((logits.argmax(-1) == labels.to(device)).sum())
            students = recorder.take()
            if teacher is not None:
                _add_distances(distances, recorder.layers, students, teacher(images, statistics)[1])
            if images_seen >= max_images:
                break
    if not images_seen:
        raise QsdError("there are no images to measure with.")
    means = None if teacher is None else {key: total / images_seen for key, total in distances.items()}
    accuracy = None if hits != hits else hits / images_seen
    return Information(images_seen, accuracy, meter.signals(means))


def _add_distances(
    totals: dict[tuple[str, str], float],
    layers: list[str],
    students: list[AttentionMaps],
    teachers: list[AttentionMaps],
) -> None:
    found = attention_distances(students, teachers)
    for projection, (i, layer) in product(PROJECTIONS, enumerate(layers)):
        totals[layer, projection] += float(found[projection][i].mean(1).sum())


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _attached(hooks: Any) -> Iterator[Any]:
    try:
        yield hooks
    finally:
        hooks.remove()


def _distribution(moments: list[float], histogram: list[int]) -> Distribution:
    """A distribution from the means of the first four powers."""
    mean, second, third, fourth = moments
    variance = max(second - mean**2, 0.0)
    if variance <= 1e-12 * max(second, 1e-300):  # rounding
        return Distribution(mean, 0.0, nan, histogram)
    skewness = (third - 3 * mean * second + 2 * mean**3) / variance**1.5
    kurtosis = (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / variance**2
    return Distribution(mean, variance**0.5, (skewness**2 + 1) / kurtosis, histogram)


def _entropy(numbers: Tensor) -> float:
    """Entropy in bits of a distribution, given by the number of times that each value occurs."""
    shares = numbers[numbers > 0].double() / numbers.sum()
    return abs(float((shares * shares.log2()).sum()))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and value != value else value
