"""Conversion of a trained network into one of binary spikes, and the two ways to run it."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from qsd.errors import QsdError
from qsd.layers import QuantConv2d
from qsd.models.compact import CompactModel
from qsd.neurons import LearnedStepNeuron, SpikeNeuron
from qsd.spiking.clock import Clock
from qsd.spiking.layers import DelayedNeuron, SpikingChain, SpikingLinear
from qsd.spiking.rules import Conversion, Merge, check_merge
from qsd.spiking.runtime import IMAGE, Runtime, Stream, Trace, TracedTensor, call_names, delay_choice, matches, plain

logger = logging.getLogger(__name__)

Delay = int | Mapping[str, int] | None

_PIXELS_AT_A_TIME = 16 * 224 * 224  # times steps, of a simulation
_DEPTH = 16  # values that a network holds for a pixel of an image, about, in its largest layer


class SpikingNetwork(nn.Module):
    """A converted network. Calling it evaluates the count domain; `simulate` fires spike by spike.

    At delays of T - 1 and more both give the same counts: calling costs one pass, T times less than simulating.

    Args:
        network: converted modules in the trained model's structure.
        runtime: which they share.
        example: an input to trace with, ``[1, ...]``.
        trained: what it was converted from, for packed files.
        merge: see `to_spike_driven`.
        merged_bits: see `to_spike_driven`.
        currents: see `to_spike_driven`.
    """

    example: Tensor

    def __init__(
        self,
        network: nn.Module,
        runtime: Runtime,
        example: Tensor,
        trained: CompactModel,
        merge: Merge,
        merged_bits: int | None,
        currents: bool = False,
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.runtime = runtime
        self.trained, self.merge, self.merged_bits, self.currents = trained, merge, merged_bits, currents
        self.register_buffer("example", example, persistent=False)
        self._timings: dict[tuple[int, ...], tuple[int, int]] = {}
        self.eval()

    @property
    def time_steps(self) -> int:
        """T of all neurons."""
        return self.runtime.time_steps

    def neurons(self) -> dict[str, DelayedNeuron]:
        """All neurons, by their dotted names in the trained model, in the order of registration."""
        return {m.name: m for m in self.network.modules() if isinstance(m, DelayedNeuron)}

    def has(self, pattern: str) -> bool:
        """Whether a name or glob, as `simulate` takes them, means one of the neurons or of their calls.

        Args:
            pattern: name or glob.
        """
        neurons = self.neurons()
        return any(matches(call, [pattern]) for call in self.runtime.occupation if call.partition("@")[0] in neurons)

    def chains(self) -> dict[str, SpikingChain]:
        """All chains of convolutions, by their dotted names in the trained model."""
        return {m.name: m for m in self.network.modules() if isinstance(m, SpikingChain)}

    def train(self, mode: bool = True) -> "SpikingNetwork":
        """Stays in evaluation: a converted network is not trained."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """The network's output in the count domain, where all delays are lossless.

        Args:
            images: ``[B, C, H, W]``.

        Raises:
            QsdError: if a stored delay is below T - 1: the counts then depend on time, use `simulate`.
        """
        for name, neuron in self.neurons().items():
            if neuron.delay < self.time_steps - 1:
                raise QsdError(
                    f"neuron {name} has a delay of {neuron.delay}, below T - 1 = {self.time_steps - 1}: its counts "
                    "depend on time; call simulate(images)."
                )
        with self.runtime.running("count"):
            return self.network(images)

    @torch.no_grad()
    def simulate(self, images: Tensor, delay: Delay = None, record: str | Iterable[str] = ()) -> Trace:
        """Run the network on binary spikes, a layer at a time over its window of T steps.

        Args:
            images: ``[B, C, H, W]``; of a network that takes currents, their sums over the window.
            delay: overrides the stored delays: one for all, or by name or glob.
            record: names or globs of neurons to record; each keeps its spikes and membranes for all steps.

        Returns:
            Output, recordings and latency.
        """
        patterns, latency, handed = self._patterns(record), self.latency(delay), self.runtime.on_counts
        counts: dict[str, list[Tensor]] = {}
        # A few images at a time: all steps of a layer lie in memory at once.
        pixels = images[0].numel() // _DEPTH if self.currents else images[0, 0].numel()
        size = max(1, _PIXELS_AT_A_TIME // (self.time_steps * max(1, pixels)))
        traces = []
        try:
            if handed is not None:
                self.runtime.on_counts = lambda name, count: counts.setdefault(name, []).append(count)
            for some in images.split(size):
                traces.append(self._simulate(some, delay, patterns, latency))
        finally:
            self.runtime.on_counts = handed
        for name in counts:
            assert handed is not None
            handed(name, torch.cat(counts[name]))
        return _joined(traces)

    def _simulate(self, images: Tensor, delay: Delay, record: tuple[str, ...], latency: int) -> Trace:
        runtime = self.runtime
        with runtime.running("step", delay_choice(delay), len(images)):
            runtime.record = record
            runtime.trace = trace = Trace(torch.empty(0), latency)
            # Images are the same in every step and have no time axis; currents come in T equal parts.
            inputs = torch.cat([images / self.time_steps] * self.time_steps) if self.currents else images
            trace.logits = tree_map_only(Tensor, lambda x: runtime.split(x).sum(0), self.network(inputs))
        return trace

    def latency(self, delay: Delay = None) -> int:
        """Steps from the first of the image to the last of the output, on one global clock.

        ``T`` plus the delays on the longest path, plus ``T - 1`` for every attention on it, whose query waits for
        ``k^T v`` to be complete.

        Args:
            delay: as in `simulate`.
        """
        return self._timing(delay)[0]

    def interval(self, delay: Delay = None) -> int:
        """Least steps between two images: the longest occupation of any membrane, running sum, or attention matrix.

        Args:
            delay: as in `simulate`.
        """
        return self._timing(delay)[1]

    def _timing(self, delay: Delay) -> tuple[int, int]:
        """Latency and least interval; the network is traced once for every choice of delays."""
        choose = delay_choice(delay)
        delays = tuple(choose(name, neuron.delay) for name, neuron in self.neurons().items())
        if delays not in self._timings:
            latency = self.time_steps + max(output.arrival for output in self._trace(delay))
            self._timings[delays] = latency, max(self.runtime.occupation.values())
        return self._timings[delays]

    @torch.no_grad()
    def stream(
        self,
        images: Iterable[Tensor],
        delay: Delay = None,
        interval: int | None = None,
        record: str | Iterable[str] = (),
    ) -> Stream:
        """Run images one after another on one global clock, all layers in every tick, as a chip would.

        An image enters before the one ahead of it has left: every neuron has one membrane, and takes the next image
        when it is done with the last.

        Args:
            images: batches ``[B, C, H, W]`` of one shape, in the order of arrival.
            delay: as in `simulate`.
            interval: ticks from one to the next; ``None`` for the least, see `interval`.
            record: names or globs of neurons whose counts are kept.

        Returns:
            Outputs, and when they were complete.

        Raises:
            QsdError: if the interval is too short.
        """
        batches = list(images)
        latency, least = self.latency(delay), self.interval(delay)
        if interval is not None and interval < least:
            self._trace(delay)
            busy = max(self.runtime.occupation, key=self.runtime.occupation.__getitem__)
            raise QsdError(f"interval={interval} is too short: {busy} is occupied for {least} steps by each image.")
        runtime, patterns = self.runtime, self._patterns(record)
        clock = runtime.clock = Clock(self.time_steps, len(batches), least if interval is None else interval)
        stream = Stream([], [], latency, clock.interval)
        latest = self.time_steps if self.currents else clock.interval  # an image stays, currents end with their window

        def keep(name: str, counts: Tensor) -> None:
            if matches(name, patterns):
                stream.counts.setdefault(name, []).append(counts.to(torch.uint8))

        with runtime.running("clock", delay_choice(delay)), runtime.counting(keep):
            for _ in range((len(batches) - 1) * clock.interval + latency):
                clock.advance()
                number, step = clock.image(0)
                image = batches[number] if 1 <= step <= latest else torch.zeros_like(batches[0])
                runtime.calls.clear()
                output = self.network(self._mark(image / self.time_steps if self.currents else image))
                self._read(output, clock, stream)
        return stream

    def _mark(self, images: Tensor) -> TracedTensor:
        return TracedTensor.mark(images, None if self.currents else IMAGE, 0, self.runtime)

    def _read(self, output: Any, clock: Clock, stream: Stream) -> None:
        """Accumulate the output, all parts of which wait for the latest, over its window."""
        leaves, structure = tree_flatten(output)
        aligned, arrival = self.runtime.aligned(tuple(leaves))
        parts = [plain(x) for x in aligned]
        _, step = clock.image(arrival)
        if step == 1:
            stream.logits.append(tree_unflatten(parts, structure))
        elif 1 < step <= clock.time_steps:
            sums = tree_leaves(stream.logits[-1])
            stream.logits[-1] = tree_unflatten([total + part for total, part in zip(sums, parts)], structure)
        if step == clock.time_steps:
            stream.finished.append(clock.tick)

    def _patterns(self, record: str | Iterable[str]) -> tuple[str, ...]:
        patterns = (record,) if isinstance(record, str) else tuple(record)
        for pattern in patterns:
            if not self.has(pattern):
                raise QsdError(
                    f"record={pattern!r} names no neuron; names are {', '.join(list(self.neurons())[:3])}, ..."
                )
        return patterns

    @torch.no_grad()
    def _trace(self, delay: Delay = None) -> list[TracedTensor]:
        with self.runtime.running("trace", delay_choice(delay)):
            self.runtime.sources.clear()
            self.runtime.occupation.clear()
            output = self.network(self._mark(self.example.clone()))
            self.runtime.repeated = frozenset(name for name, calls in self.runtime.calls.items() if calls > 1)
        outputs = tree_leaves(output)
        if not outputs or not all(isinstance(x, TracedTensor) for x in outputs):
            found = next((x for x in outputs if not isinstance(x, TracedTensor)), output)
            raise QsdError(f"the model returns a {type(found).__name__}; only tensors can be converted.")
        return outputs

    def _absorb_amplitudes(self) -> None:
        """Move what spikes are worth into the weights that they meet."""
        self._trace()  # which tells how often each layer runs
        scaled = -1
        while scaled != (scaled := sum(neuron.scaled for neuron in self.neurons().values())):
            for output in self._trace():
                if isinstance(output.source, DelayedNeuron):
                    output.source.scaled = True
        for layer in self.network.modules():
            if isinstance(layer, SpikingLinear) and isinstance(
                source := self.runtime.sources.get(layer.name), DelayedNeuron
            ):
                layer.absorb(source.amplitude)
        self.runtime.converting = False


@torch.no_grad()
def to_spike_driven(
    model: nn.Module,
    delay: Delay = None,
    merge: Merge = True,
    merged_bits: int | None = None,
    example: Tensor | None = None,
    time_steps: int | None = None,
    currents: bool = False,
) -> SpikingNetwork:
    """Convert a trained network into one whose neurons exchange binary spikes, without losing anything.

    Batch norms and layer scales go into weights, attention's scale is in its neuron's threshold. Before it returns,
    a random image is run through the trained network and both forms of the new one, in float64, and all counts are
    compared.

    Args:
        model: a model of ours, or built from our layers; it is not changed.
        delay: steps by which neurons wait, for all or by name or glob; ``None`` for T - 1, which is lossless.
        merge: turn chains of convolutions without a neuron between (RepConv, SepConv) into one convolution each, so
            that every synaptic operation but the first sees spikes; ``"rep"`` or ``"sep"`` for one kind only.
        merged_bits: quantize the merged kernels (symmetric, per output channel); not lossless.
        example: an input ``[1, ...]`` to compare with; ``None`` for a random image of 32 x 32 pixels, or of as many as
            the network needs.
        time_steps: another T than that of the training, for neurons of learned steps (CSDformer). They keep their range
            and divide it anew, which is another network: a warning names what to expect.
        currents: the input is no image but currents that neurons see at once: their sums over a window, of which a
            T-th arrives in each step. So is the second part of a network that is cut where something else than spikes
            decides, such as the choice of regions in a detector.

    Returns:
        The spiking network.

    Raises:
        QsdError: for a layer without a conversion rule, a float model, or counts that differ (say, because of a
            functional ReLU in the model's own ``forward``).
    """
    if time_steps is not None:
        model = _with_time_steps(model, time_steps)
    return convert(model, delay, merge, merged_bits, example, check=True, currents=currents)


@torch.no_grad()
def convert(
    model: nn.Module,
    delay: Delay,
    merge: Merge,
    merged_bits: int | None,
    example: Tensor | None,
    check: bool,
    currents: bool = False,
) -> SpikingNetwork:
    """`to_spike_driven`, which checks itself or, where that was done before, does not.

    Args:
        model: see there.
        delay: see there.
        merge: see there.
        merged_bits: see there.
        example: see there.
        check: compare all counts.
        currents: see there.
    """
    check_merge(merge, merged_bits)
    steps = {m.time_steps for m in model.modules() if isinstance(m, SpikeNeuron)}
    if len(steps) != 1:
        found = ", ".join(map(str, sorted(steps))) or "none"
        raise QsdError(f"all neurons need one number of time steps; found: {found}. Float twins cannot be converted.")
    (time_steps,) = steps
    example = _random_image(model) if example is None else example
    parameter = next(model.parameters())

    choose = delay_choice(delay)
    runtime = Runtime(time_steps)
    conversion = Conversion(runtime, lambda name: choose(name, time_steps - 1), merge, merged_bits is not None)
    # Converted in float64, so that folding rounds once; the trained model keeps its type, and the weights are on the
    # grid points that they have in it (a weight between two of them could go to the other one in float64).
    compact = CompactModel.of(model)
    trained = copy.deepcopy(model).double().eval()
    compact.load_into(trained, torch.float64)
    network = conversion.convert(copy.deepcopy(trained), "")
    example = example.to("cpu", torch.float64)
    spiking = SpikingNetwork(network, runtime, example, compact, merge, merged_bits, currents).to(parameter.device)
    negative = [name for name, neuron in spiking.neurons().items() if neuron.delay < 0]
    if negative:
        raise QsdError(f"the delay of neuron {negative[0]} is negative.")
    spiking._absorb_amplitudes()
    if merged_bits is not None:
        for chain in spiking.chains().values():
            if chain.merged is not None:
                chain.merged.quantize(merged_bits, parameter.dtype)
    elif check:
        _compare(trained, spiking)
    return spiking.to(parameter.dtype)


@torch.no_grad()
def count_spikes(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Spike counts of every neuron, from a trained network or a converted one (in the count domain).

    Args:
        model: a trained model, evaluated as it is, or a `SpikingNetwork`.
        images: ``[B, C, H, W]``.

    Returns:
        Integer-valued counts ``[B, ...]`` by the neurons' dotted names in the trained model; of a neuron that runs
        several times in a pass by ``name@0``, ``name@1``, ...
    """
    counts: dict[str, Tensor] = {}
    if isinstance(model, SpikingNetwork):
        with model.runtime.counting(counts):
            model(images)
        return counts
    with watch_neurons(model, lambda neuron, *inputs: neuron.counts(*inputs)) as calls:
        model(images)
    return named_calls(calls)


@contextmanager
def watch_neurons(model: nn.Module, look: Callable[..., Tensor]) -> Iterator[list[tuple[str, Tensor]]]:
    """Look at every neuron of a trained model whenever it runs.

    Args:
        model: a trained model.
        look: gets the neuron and its inputs.

    Yields:
        The neurons' names and what was seen, in the order of execution.
    """
    calls: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Any:
        return lambda neuron, inputs, _output: calls.append((name, look(neuron, *inputs)))

    neurons = [(name, m) for name, m in model.named_modules() if isinstance(m, SpikeNeuron)]
    handles = [neuron.register_forward_hook(hook(name)) for name, neuron in neurons]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def named_calls(calls: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """What `watch_neurons` saw in one pass, by names that `qsd.spiking.runtime.call_names` makes.

    Args:
        calls: in the order of execution.
    """
    return dict(zip(call_names([name for name, _ in calls]), (seen for _, seen in calls)))


def _joined(traces: list[Trace]) -> Trace:
    if len(traces) == 1:
        return traces[0]
    parts, structure = zip(*(tree_flatten(trace.logits) for trace in traces))
    trace = Trace(tree_unflatten([torch.cat(part) for part in zip(*parts)], structure[0]), traces[0].latency)
    for name in traces[0].spikes:
        trace.spikes[name] = torch.cat([t.spikes[name] for t in traces], dim=1)
        trace.counts[name] = torch.cat([t.counts[name] for t in traces])
        trace.membrane[name] = torch.cat([t.membrane[name] for t in traces], dim=1)
    return trace


def _random_image(model: nn.Module) -> Tensor:
    first = next((m.in_channels for m in model.modules() if isinstance(m, QuantConv2d)), 3)
    channels = getattr(model, "in_chans", first)
    generator = torch.Generator().manual_seed(0)
    side = max(32, getattr(model, "total_stride", 1))
    return torch.randn(1, channels, side, side, generator=generator, dtype=torch.float64)


def _with_time_steps(model: nn.Module, time_steps: int) -> nn.Module:
    """A copy whose neurons have another T, with a warning if that is not the one that it was trained with."""
    neurons = [m for m in model.modules() if isinstance(m, SpikeNeuron)]
    trained = sorted({neuron.time_steps for neuron in neurons})
    if trained in ([], [time_steps]):
        return model
    if not all(isinstance(neuron, LearnedStepNeuron) for neuron in neurons):
        raise QsdError(
            f"time_steps={time_steps}: neurons of a fixed step were trained with T = {trained[0]} and cannot take "
            "another; train the model with that T."
        )
    model = copy.deepcopy(model)
    for neuron in model.modules():
        if isinstance(neuron, LearnedStepNeuron):
            neuron.change_time_steps(time_steps)
    if isinstance(registered := getattr(model, "registered", None), dict):
        registered["arguments"]["time_steps"] = time_steps
    logger.warning(
        "trained with T = %d and converted with T = %d: every neuron rounds to other values, %.2g times as coarse, so "
        "the result equals a network that was never trained. Expect to lose accuracy, the more the smaller T is: "
        "measure it, or train with time_steps=%d.",
        trained[0], time_steps, trained[0] / time_steps, time_steps,
    )  # fmt: skip
    return model


def _compare(trained: nn.Module, spiking: SpikingNetwork) -> None:
    images = spiking.example
    expected_counts = count_spikes(trained, images)
    counted: dict[str, Tensor] = {}
    stepped: dict[str, Tensor] = {}
    with spiking.runtime.counting(counted), spiking.runtime.running("count"):
        logits = spiking.network(images)
    with spiking.runtime.counting(stepped):
        summed = spiking.simulate(images, delay=spiking.time_steps - 1).logits
    for way, counts in (("count domain", counted), ("simulation", stepped)):
        for name, count in expected_counts.items():
            if name not in counts or not torch.equal(count, counts[name]):
                raise QsdError(
                    f"the {way} differs from the trained network at neuron {name}: something in the model's forward is "
                    "no layer of qsd (a functional ReLU, a constant that is added, ...); make it one."
                )
    outputs = tree_leaves(trained(images))
    pairs = [pair for way in (logits, summed) for pair in zip(tree_leaves(way), outputs)]
    if not all(torch.allclose(output, expected, rtol=1e-9, atol=1e-9) for output, expected in pairs):
        raise QsdError(
            "the converted network's output differs although all counts are equal: what follows the last neuron is no "
            "layer of qsd; make it one."
        )
