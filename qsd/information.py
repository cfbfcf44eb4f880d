r"""What the spikes of attention tell about the membranes behind them.

QSD-Transformer's argument for multi-level spikes and for distillation is that low-bit queries, keys and values are
distributed badly and lose information ("spike information distortion"). Its propositions are not public; these
measurements are ours. For every attention layer and each of query, key and value:

- the membrane, in units of the input that fires T spikes: mean, deviation, histogram, bimodality;
- the spike count: the same, its firing rate (mean count over T), its entropy
  :math:`H(n) = -\sum_i p_i \log_2 p_i` against the most that T spikes can have, :math:`\log_2(T + 1)`;
- what the count keeps of the membrane: the mutual information of both (the membrane in bins of 1/16) over the
  membrane's entropy in these bins, and the share of the membrane's variance that the count explains;
- how far the token similarities are from a teacher's (`qsd.distillation`).

Bimodality is Sarle's coefficient, ``(skewness^2 + 1) / kurtosis``: 5/9 for a uniform distribution, 1/3 for a normal
one, 1 for two equal points. More than 5/9 hints at two modes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf, log2, nan
from typing import Any

import torch
from torch import Tensor, nn

from qsd.distillation import PROJECTIONS, AttentionRecorder, Teacher, attention_distances, attention_layers
from qsd.errors import QsdError
from qsd.neurons import SpikeNeuron

# Membranes are counted in bins of 1/16 from -4 to 5 times the input that fires T spikes; what lies outside is counted
# in the outermost bins.
LOWEST, HIGHEST, BINS_PER_UNIT = -4, 5, 16
BINS = (HIGHEST - LOWEST) * BINS_PER_UNIT


@dataclass(frozen=True)
class Distribution:
    """Statistics of membranes or spike counts.

    Attributes:
        mean: of all values.
        deviation: their standard deviation.
        bimodality: Sarle's coefficient; NaN if all values are equal.
        histogram: membranes: numbers by bin (`LOWEST`, `HIGHEST`, `BINS_PER_UNIT`); counts: numbers of 0, 1, ... T.
    """

    mean: float
    deviation: float
    bimodality: float
    histogram: list[int]


@dataclass(frozen=True)
class Signal:
    """Query, key or value of one attention layer, over all images.

    Attributes:
        layer: dotted name of the attention layer.
        projection: ``"query"``, ``"key"`` or ``"value"``.
        time_steps: T, or ``None`` in a float network, whose outputs are no counts.
        membrane: the neuron's input, in units of the input that fires T spikes (of 1 in a float network).
        counts: spikes per image, 0 to T; ``None`` in a float network, and so are the rest.
        firing_rate: mean count over T.
        entropy: of the counts, in bits.
        max_entropy: ``log2(T + 1)`` bits.
        kept_information: mutual information of counts and binned membranes over the entropy of the latter, 0 to 1.
        kept_variance: share of the membrane's variance that the counts explain, 0 to 1.
        silent_heads: share of heads and images in which no neuron fires.
        teacher_distance: mean distance to the teacher's token similarity, 0 to 2; ``None`` without a teacher.
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
    """What `measure_information` found.

    Attributes:
        images: how many were seen.
        accuracy: share of them that was classified right; ``None`` without labels.
        signals: one for every attention layer and projection, in the network's order.
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
        heads: of the attention layer.
    """

    def __init__(self, time_steps: int | None, heads: int) -> None:
        self.time_steps, self.heads = time_steps, heads
        self.reset()

    def reset(self) -> None:
        """Start afresh."""
        levels = (self.time_steps or 0) + 1
        self.joint = torch.zeros(BINS, levels, dtype=torch.int64)  # membranes' bins by counts
        self.powers = torch.zeros(5, dtype=torch.float64)  # sums of the membrane's powers 0 to 4
        self.by_count = torch.zeros(levels, dtype=torch.float64)  # sums of the membrane, by count
        self.silent = torch.zeros(2, dtype=torch.float64)  # silent heads, and all

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
        """Take the other processes' images in.

        Args:
            add_over_processes: the sum of a tensor over all processes.
        """
        for name in ("joint", "powers", "by_count", "silent"):
            setattr(self, name, add_over_processes(getattr(self, name)))

    def signal(self, layer: str, projection: str, teacher_distance: float | None = None) -> Signal:
        """What the sums say.

        Args:
            layer: see `Signal`.
            projection: see `Signal`.
            teacher_distance: see `Signal`.
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
    """Watch the attention of a network: a `SignalMeter` on each query, key and value neuron.

    Args:
        model: a network with named attention taps.
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
                    meter.update(neuron.drive(*inputs) / neuron.time_steps, neuron.counts(*inputs))
                else:
                    meter.update(inputs[0], None)

        return hook

    def signals(self, distances: dict[tuple[str, str], float] | None = None) -> list[Signal]:
        """What was measured, in the network's order.

        Args:
            distances: to a teacher, by layer and projection.
        """
        found = distances or {}
        return [meter.signal(*key, teacher_distance=found.get(key)) for key, meter in self.meters.items()]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def measure_information(
    model: nn.Module,
    batches: Iterable[Any],
    teacher: Teacher | None = None,
    statistics: Any = None,
    max_images: float = inf,
) -> Information:
    """Measure what the spikes of attention tell about the membranes behind them.

    Args:
        model: a network with named attention taps: ours, spiking or float. It is evaluated, and left as it was.
        batches: images ``[B, C, H, W]``, alone or with labels ``[B]``, such as a data loader.
        teacher: to compare token similarities with.
        statistics: mean and standard deviation that the images were normalised with, if the teacher needs them.
        max_images: stop after so many images (to the next batch).

    Raises:
        QsdError: if the network has no such attention, or there are no images.
    """
    if not attention_layers(model):
        raise QsdError(
            f"{type(model).__name__} has no attention with q_neuron, k_neuron and v_neuron: nothing can be measured."
        )
    device = next(model.parameters()).device
    distances: dict[tuple[str, str], float] = dict.fromkeys(
        ((layer, projection) for layer in attention_layers(model) for projection in PROJECTIONS), 0.0
    )
    images_seen, hits = 0, 0.0
    with (
        _evaluated(model),
        _attached(InformationMeter(model)) as meter,
        _attached(AttentionRecorder(model)) as recorder,
    ):
        for batch in batches:
            images, labels = batch if isinstance(batch, tuple | list) else (batch, None)
            images = images.to(device)
            images_seen += len(images)
            recorder.start()
            logits = model(images)
            hits = nan if labels is None else hits + float((logits.argmax(-1) == labels.to(device)).sum())
            students = recorder.take()
            if teacher is not None:
                found = attention_distances(students, teacher(images, statistics)[1])
                for i, layer in enumerate(recorder.layers):
                    for projection in PROJECTIONS:
                        distances[layer, projection] += float(found[projection][i].mean(1).sum())
            if images_seen >= max_images:
                break
    if not images_seen:
        raise QsdError("there are no images to measure with.")
    means = None if teacher is None else {key: total / images_seen for key, total in distances.items()}
    accuracy = None if hits != hits else hits / images_seen
    return Information(images_seen, accuracy, meter.signals(means))


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
    """From the means of the first four powers."""
    mean, second, third, fourth = moments
    variance = max(second - mean**2, 0.0)
    if variance <= 1e-12 * max(second, 1e-300):  # rounding
        return Distribution(mean, 0.0, nan, histogram)
    skewness = (third - 3 * mean * second + 2 * mean**3) / variance**1.5
    kurtosis = (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / variance**2
    return Distribution(mean, variance**0.5, (skewness**2 + 1) / kurtosis, histogram)


def _entropy(numbers: Tensor) -> float:
    """In bits, of a distribution that is given by how often each value occurs."""
    shares = numbers[numbers > 0].double() / numbers.sum()
    return abs(float((shares * shares.log2()).sum()))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and value != value else value
