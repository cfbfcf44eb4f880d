"""Whole detectors and segmenters on binary spikes.

The network is split at non-spiking decisions (proposals, NMS). Each part is a *segment*: a `SpikingNetwork` of its own.
A one-stage detector or a segmenter has one segment, ``"dense"``: backbone, neck and head. A two-stage detector chooses
regions by the final sums of its first segment (backbone, neck, RPN head). RoIAlign cuts them out of the neck's
currents, summed over time, and each RoI head is a segment whose input is these currents. Decoding of boxes, NMS and
RoIAlign are mmdet's own and belong to no segment.
"""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from qsd.energy import CodeCost, Energy, OperationCounter, Preset, Prices
from qsd.energy.prices import chosen_prices
from qsd.errors import QsdError
from qsd.mm.spiking.segments import DENSE, cut, dense_head
from qsd.neurons import SpikeNeuron
from qsd.precision import full_float32
from qsd.spiking import Audit, SpikingNetwork, Trace, to_spike_driven
from qsd.spiking.audit import Auditor
from qsd.spiking.codes import Code, CodeName
from qsd.spiking.merging import Merge
from qsd.spiking.names import Delay, check_delay, delay_within

Batch = dict[str, Any]


@dataclass
class Simulation:
    """Result of simulating a detector or segmenter on binary spikes.

    Attributes:
        samples: Predictions in the form of the trained model's.
        traces: Traces by segment, one for each run of the segment.
    """

    samples: list[Any]
    traces: dict[str, list[Trace]] = field(default_factory=dict)


class _Thread(threading.local):
    """The way in which the present thread runs the segments. Copies and pickles of a model begin with the usual one."""

    def __init__(self) -> None:
        self.run: Callable[[str, Tensor], Any] | None = None
        self.output: Any = None

    def __reduce__(self) -> tuple[type["_Thread"], tuple[()]]:
        return _Thread, ()


class ConvertedModel(nn.Module):
    """A converted detector or segmenter, which several threads may call at once.

    Args:
        model: The trained model. Its networks are replaced and everything else is used; the object is taken over.
        segments: Spiking networks by name, ``"dense"`` first.
    """

    def __init__(self, model: Any, segments: dict[str, SpikingNetwork]) -> None:
        super().__init__()
        self.names = tuple(segments)
        self.networks = nn.ModuleList(segments.values())
        self.model: Any = model
        self._thread = _Thread()
        model.extract_feat = self._extract
        getattr(model, dense_head(model)).forward = self._dense_head
        for name in self.names[1:]:
            model.get_submodule(name).forward = partial(self._segment, name)
        # The spiking networks hold these weights already.
        model.backbone, model.neck = nn.Identity(), nn.Identity()
        self.eval()

    def _segment(self, name: str, x: Tensor) -> Any:
        run = self._thread.run
        return self.segments[name](x) if run is None else run(name, x)

    def _extract(self, images: Tensor) -> Any:
        features, self._thread.output = self._segment(DENSE, images.to(self.segments[DENSE].example.dtype))
        return features

    def _dense_head(self, _features: Any) -> Any:
        return self._thread.output

    @property
    def segments(self) -> dict[str, SpikingNetwork]:
        """The spiking networks by name, in the order in which they run."""
        return {
            name: network for name, network in zip(self.names, self.networks) if isinstance(network, SpikingNetwork)
        }

    @property
    def time_steps(self) -> int:
        """T of all neurons."""
        return self.segments[DENSE].time_steps

    @property
    def code(self) -> Code:
        """How a count travels as binary spikes, in all segments."""
        return self.segments[DENSE].code

    @property
    def lossless_delay(self) -> int:
        """The shortest lossless delay."""
        return self.code.lossless_delay

    @property
    def lossless(self) -> bool:
        """Whether every neuron waits for its whole input."""
        return all(network.lossless for network in self.segments.values())

    def train(self, mode: bool = True) -> "ConvertedModel":
        """Stay in evaluation: a converted model is not trained."""
        del mode
        return super().train(False)

    @contextmanager
    def running(self, run: Callable[[str, Tensor], Any]) -> Iterator[None]:
        """Run the segments by a function instead of in the count domain, in this thread.

        Args:
            run: Receives a segment's name and its input, and returns its output.
        """
        thread = self._thread
        before, thread.run = thread.run, run
        try:
            yield
        finally:
            thread.run, thread.output = before, None

    def predict(self, batch: Batch) -> list[Any]:
        """Predictions in the count domain, where all delays are lossless.

        Args:
            batch: Batch of a data loader of mmdet or mmseg: ``inputs`` and ``data_samples``.

        Raises:
            QsdError: If a stored delay is below T - 1; use `simulate`.
        """
        return predict(self.model, batch)

    def simulate(self, batch: Batch, delay: Delay = None, record: str | Iterable[str] = ()) -> Simulation:
        """Predictions on binary spikes, segment by segment.

        Args:
            batch: See `predict`.
            delay: As in `SpikingNetwork.simulate`.
            record: Names or globs of neurons, as in `SpikingNetwork.simulate`.

        Raises:
            QsdError: For a name that no segment has.
        """
        patterns = (record,) if isinstance(record, str) else tuple(record)
        for pattern in patterns:
            if not any(network.has(pattern) for network in self.segments.values()):
                known = ", ".join(list(self.segments[DENSE].neurons())[:3])
                raise QsdError(f"record={pattern!r} names no neuron; names are {known}, ...")
        simulation, delays = Simulation([]), self._delays(delay)

        def step(name: str, x: Tensor) -> Any:
            network = self.segments[name]
            trace = network.simulate(x, delays[name], [pattern for pattern in patterns if network.has(pattern)])
            simulation.traces.setdefault(name, []).append(trace)
            return trace.logits

        with self.running(step):
            simulation.samples = predict(self.model, batch)
        return simulation

    @contextmanager
    def counting(self, count: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Pass the spike counts of every neuron layer that runs to a function.

        Args:
            count: Receives a neuron layer's name (``name@level`` in a head that pyramid levels share) and its spike
                counts ``[B, ...]``; in a region head the batch dimension is the regions.
        """
        with ExitStack() as stack:
            for network in self.segments.values():
                stack.enter_context(network.runtime.counting(count))
            yield

    def latency(self, delay: Delay = None) -> int:
        """Time steps from the first input of an image to the last output, without the decisions between segments.

        The segments follow one another; the mask heads of a cascade run on the same regions at the same time.

        Args:
            delay: As in `SpikingNetwork.simulate`.
        """
        delays = self._delays(delay)
        steps = {name: network.latency(delays[name]) for name, network in self.segments.items()}
        masks = [latency for name, latency in steps.items() if ".mask_head" in name]
        return sum(latency for name, latency in steps.items() if ".mask_head" not in name) + max(masks, default=0)

    def interval(self, delay: Delay = None) -> int:
        """Smallest number of time steps between two images, or two sets of regions, that follow one another.

        Args:
            delay: As in `SpikingNetwork.simulate`.
        """
        delays = self._delays(delay)
        return max(network.interval(delays[name]) for name, network in self.segments.items())

    def _delays(self, delay: Delay) -> dict[str, Delay]:
        """The delays of each segment; a name or glob concerns the segments that have such neurons."""
        return _delays_of_parts(delay, {name: [*network.neurons()] for name, network in self.segments.items()})

    def audit(self, batches: Iterable[Batch], delay: Delay = None, progress: bool = False) -> Audit:
        """Simulate all segments and check the input of every synaptic operation, as `audit_spike_driven` does.

        Args:
            batches: See `predict`.
            delay: As in `SpikingNetwork.simulate`.
            progress: Whether to show a progress bar.
        """
        delays = self._delays(delay)
        auditors = {name: Auditor(network, delays[name]) for name, network in self.segments.items()}
        with self.running(lambda name, x: auditors[name].run(x)):
            images = self._run_all(batches, "audit" if progress else None)
        audits = [auditor.audit(images) for auditor in auditors.values()]
        return Audit([operation for audit in audits for operation in audit.operations], images)

    def energy(
        self,
        batches: Iterable[Batch],
        preset: Preset = "fp32",
        progress: bool = False,
        prices: Prices | str | Path | None = None,
    ) -> dict[str, Energy]:
        """Count the operations of every segment and price them per image, as `measure_energy` does.

        RoIAlign, NMS and the decoding of boxes are not included.

        Args:
            batches: See `predict`.
            preset: As in `measure_energy`.
            progress: Whether to show a progress bar.
            prices: As in `measure_energy`.

        Returns:
            Energy by segment; `total_energy` adds them up.
        """
        name, known = chosen_prices(preset, prices)
        counters = {name: OperationCounter(network) for name, network in self.segments.items()}
        with self.running(lambda name, x: counters[name].run(x)):
            images = self._run_all(batches, "energy" if progress else None)
        return {segment: counter.energy(name, images, known) for segment, counter in counters.items()}

    @full_float32()
    def _run_all(self, batches: Iterable[Batch], progress: str | None) -> int:
        images = 0
        for batch in batches if progress is None else track(batches, progress, transient=True):
            images += len(predict(self.model, batch))
        if not images:
            raise QsdError("there are no images to measure on; give at least one.")
        return images


def total_energy(energies: dict[str, Energy]) -> Energy:
    """The energy of all segments in one table.

    Args:
        energies: Energy by segment, measured on the same images.
    """
    first = next(iter(energies.values()))
    layers = [layer for energy in energies.values() for layer in energy.layers]
    merged = all(energy.merged for energy in energies.values())
    codes = [CodeCost.sum(costs) for costs in zip(*(energy.codes for energy in energies.values()))]
    total = Energy(first.preset, first.time_steps, merged, first.images, layers, codes, first.prices)
    for energy in energies.values():
        total.counts.add(energy.counts)
    return total


@torch.no_grad()
def predict(model: Any, batch: Batch) -> list[Any]:
    """Predictions of a detector or segmenter for a batch, in the floating-point type of its weights.

    Args:
        model: Model in evaluation: a trained one, or the ``model`` of a `ConvertedModel`.
        batch: Batch of a data loader; it is not changed.
    """
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return model.predict(data["inputs"].to(dtype), data["data_samples"])


@torch.no_grad()
def convert_model(
    model: nn.Module,
    delay: Delay = None,
    merge: Merge = True,
    merged_bits: int | None = None,
    code: CodeName = "unary",
) -> ConvertedModel:
    """Convert a trained detector or segmenter into one whose networks exchange binary spikes.

    Each segment is converted by `qsd.to_spike_driven`, which compares all counts on random input before it returns.
    Neurons keep their dotted names in the model.

    Args:
        model: Model of mmdet or mmseg, with this package's backbone, neck and heads; it is not changed.
        delay: As in `qsd.to_spike_driven`.
        merge: As in `qsd.to_spike_driven`.
        merged_bits: As in `qsd.to_spike_driven`.
        code: As in `qsd.to_spike_driven`.

    Raises:
        QsdError: For a model of another structure, or with a layer that does not spike.
    """
    model = copy.deepcopy(model).eval()
    segments, parts = {}, cut(model)
    delays = _delays_of_parts(delay, {name: _neuron_names(part) for name, (part, _) in parts.items()})
    for name, (part, example) in parts.items():
        segments[name] = to_spike_driven(
            part, delays[name], merge, merged_bits, example, currents=name != DENSE, code=code
        )
    if len(steps := {network.time_steps for network in segments.values()}) > 1:
        found = ", ".join(map(str, sorted(steps)))
        raise QsdError(f"all neurons need one number of time steps; found: {found}.")
    return ConvertedModel(model, segments)


def _neuron_names(part: nn.Module) -> list[str]:
    return [name for name, module in part.named_modules() if isinstance(module, SpikeNeuron)]


def _delays_of_parts(delay: Delay, neurons: Mapping[str, Sequence[str]]) -> dict[str, Delay]:
    check_delay(delay, [name for names in neurons.values() for name in names])
    return {part: delay_within(delay, names) for part, names in neurons.items()}
