"""A converted network, and the ways to run it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from qsd.errors import QsdError
from qsd.models.compact import CompactModel
from qsd.spiking.clock import Clock
from qsd.spiking.codes import Code
from qsd.spiking.layers import DelayedNeuron, SpikingChain, TimedLayer
from qsd.spiking.merging import MergeChoice
from qsd.spiking.names import Delay, delay_choice, matches
from qsd.spiking.results import Stream, Trace, join_traces
from qsd.spiking.runtime import Runtime
from qsd.spiking.signals import IMAGE, MarkedTensor, plain

# A simulation takes as many images at a time as have this number of pixels, counted once for every time step. Currents
# have many channels; about as many values belong to one pixel of an image as the largest layer has per pixel.
_PIXELS_AT_A_TIME = 16 * 224 * 224
_VALUES_PER_PIXEL = 16


class SpikingNetwork(nn.Module):
    """A converted network. Calling it evaluates the count domain; `simulate` fires spike by spike.

    At lossless delays both give the same counts: calling costs one pass, simulating one for each step of a window.

    Args:
        network: Converted modules in the trained model's structure.
        runtime: Runtime that they share.
        example: An input to trace with, ``[1, ...]``.
        trained: State of the trained network, for packed files.
        merge: Chains that are merged: ``"all"``, ``"none"``, ``"rep"`` or ``"sep"``.
        merged_bits: Bits of merged kernels, or ``None`` for floats.
        currents: Whether the input is currents and no image.
    """

    example: Tensor

    def __init__(
        self,
        network: nn.Module,
        runtime: Runtime,
        example: Tensor,
        trained: CompactModel,
        merge: MergeChoice,
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

    @property
    def code(self) -> Code:
        """How a count travels as binary spikes."""
        return self.runtime.code

    @property
    def lossless_delay(self) -> int:
        """The shortest lossless delay: T - 1, in the binary code one less than the number of digits."""
        return self.code.lossless_delay

    @property
    def lossless(self) -> bool:
        """Whether every neuron waits for its whole input, so that counts do not depend on time."""
        return self.early_neuron() is None

    def early_neuron(self) -> DelayedNeuron | None:
        """The first neuron that may fire before its input is complete, if any."""
        return next((n for n in self.neurons().values() if n.delay < self.lossless_delay), None)

    def neurons(self) -> dict[str, DelayedNeuron]:
        """All neurons, by their dotted names in the trained model, in the order of registration."""
        return {m.name: m for m in self.network.modules() if isinstance(m, DelayedNeuron)}

    def layers(self) -> dict[str, TimedLayer]:
        """All layers of the engine, by their dotted names in the trained model, in the order of registration."""
        return {m.name: m for m in self.network.modules() if isinstance(m, TimedLayer)}

    def chains(self) -> dict[str, SpikingChain]:
        """All chains of convolutions, by their dotted names in the trained model."""
        return {m.name: m for m in self.network.modules() if isinstance(m, SpikingChain)}

    def has(self, pattern: str) -> bool:
        """Whether a name or glob matches one of the neurons or of their calls.

        Args:
            pattern: Name or glob.
        """
        neurons = self.neurons()
        return any(matches(call, [pattern]) for call in self.runtime.busy_steps if call.partition("@")[0] in neurons)

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
            QsdError: If a stored delay is below T - 1: the counts then depend on time, use `simulate` or `evaluate`.
        """
        if (early := self.early_neuron()) is not None:
            raise QsdError(
                f"neuron {early.name} has a delay of {early.delay}, below T - 1 = {self.lossless_delay}: its counts "
                "depend on time; call simulate(images)."
            )
        with self.runtime.running("count"):
            return self.network(images)

    def evaluate(self, images: Tensor) -> Any:
        """The network's output: in the count domain if all delays are lossless, else time step by time step.

        Args:
            images: ``[B, C, H, W]``.
        """
        return self(images) if self.lossless else self.simulate(images).logits

    @torch.no_grad()
    def simulate(self, images: Tensor, delay: Delay = None, record: str | Iterable[str] = ()) -> Trace:
        """Run the network on binary spikes, a layer at a time over all steps of its window.

        Args:
            images: ``[B, C, H, W]``; of a network that takes currents, their sums over the window.
            delay: Overrides the stored delays: one for all, or by name or glob.
            record: Names or globs of neurons to record; each keeps its spikes and membranes for all steps.

        Returns:
            Output, counts of all neurons, recordings and latency.
        """
        patterns, latency = self._patterns(record), self.latency(delay)
        # A few images at a time: all steps of a layer lie in memory at once.
        pixels = images[0].numel() // _VALUES_PER_PIXEL if self.currents else images[0, 0].numel()
        size = max(1, _PIXELS_AT_A_TIME // (self.code.steps * max(1, pixels)))
        trace = join_traces([self._simulate(part, delay, patterns, latency) for part in images.split(size)])
        for call, counts in trace.counts.items():
            self.runtime.hand_out(call, counts.to(images.dtype))
        return trace

    def _simulate(self, images: Tensor, delay: Delay, record: tuple[str, ...], latency: int) -> Trace:
        runtime = self.runtime
        trace = Trace(torch.empty(0), latency)
        with runtime.running("step", delay_choice(delay), record=record, trace=trace):
            # Images are the same in every step and have no time axis; currents come in parts.
            inputs = self.code.spread(images) if self.currents else images
            output = self.network(self._mark(inputs))
            trace.logits = tree_map_only(Tensor, lambda x: runtime.split(plain(x)).sum(0), output)
        return trace

    def latency(self, delay: Delay = None) -> int:
        """Time steps on one global clock from the first input step to the last output step.

        The steps of a window plus the delays on the longest path, plus the steps but one for every attention on it
        whose query waits for ``k^T v`` to be complete.

        Args:
            delay: Overrides the stored delays, as in `simulate`.
        """
        return self._timing(delay)[0]

    def interval(self, delay: Delay = None) -> int:
        """Fewest steps between two images: the longest time that one occupies a membrane, a running sum or a matrix.

        Args:
            delay: Overrides the stored delays, as in `simulate`.
        """
        return self._timing(delay)[1]

    def _timing(self, delay: Delay) -> tuple[int, int]:
        """Latency and least interval; the network is traced once for every choice of delays."""
        choose = delay_choice(delay)
        delays = tuple(choose(name, neuron.delay) for name, neuron in self.neurons().items())
        if delays not in self._timings:
            latency = self.code.steps + max(output.arrival for output in self._trace(delay))
            self._timings[delays] = latency, max(self.runtime.busy_steps.values())
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
            images: Batches ``[B, C, H, W]`` of one shape, in the order of arrival.
            delay: Overrides the stored delays, as in `simulate`.
            interval: Ticks from one image to the next; ``None`` for the least, see `interval`.
            record: Names or globs of neurons whose counts are kept.

        Returns:
            Outputs, and the ticks in which they were complete.

        Raises:
            QsdError: If the interval is too short.
        """
        batches = list(images)
        latency, interval = self.latency(delay), self._interval(delay, interval)
        runtime, patterns = self.runtime, self._patterns(record)
        code = self.code
        clock = Clock(code.steps, len(batches), interval)
        stream = Stream([], [], latency, clock.interval)
        latest = code.steps if self.currents else clock.interval  # An image stays, currents end with their window.

        def keep(name: str, counts: Tensor) -> None:
            if matches(name, patterns):
                stream.counts.setdefault(name, []).append(counts.to(torch.uint8))

        with runtime.running("clock", delay_choice(delay), clock=clock) as run, runtime.counting(keep):
            for _ in range((len(batches) - 1) * clock.interval + latency):
                clock.advance()
                number, step = clock.image(0)
                image = batches[number] if 1 <= step <= latest else torch.zeros_like(batches[0])
                run.calls.clear()
                output = self.network(self._mark(code.part(image, step) if self.currents else image))
                self._read(output, clock, stream)
        return stream

    def _interval(self, delay: Delay, chosen: int | None) -> int:
        """The chosen interval between images, or the least; one below the least is refused."""
        least = self.interval(delay)
        if chosen is not None and chosen < least:
            self._trace(delay)
            busy = max(self.runtime.busy_steps, key=self.runtime.busy_steps.__getitem__)
            raise QsdError(f"interval={chosen} is too short: {busy} is occupied for {least} steps by each image.")
        return least if chosen is None else chosen

    def _mark(self, images: Tensor) -> MarkedTensor:
        return MarkedTensor.mark(images, None if self.currents else IMAGE, 0, self.runtime)

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
    def _trace(self, delay: Delay = None) -> list[MarkedTensor]:
        with self.runtime.running("trace", delay_choice(delay)) as run:
            self.runtime.sources.clear()
            self.runtime.busy_steps.clear()
            output = self.network(self._mark(self.example.clone()))
            self.runtime.repeated = frozenset(name for name, calls in run.calls.items() if calls > 1)
        outputs = tree_leaves(output)
        if not outputs or not all(isinstance(x, MarkedTensor) for x in outputs):
            found = next((x for x in outputs if not isinstance(x, MarkedTensor)), output)
            raise QsdError(f"the model returns a {type(found).__name__}; only tensors can be converted.")
        return outputs

    def absorb_amplitudes(self) -> None:
        """Move the amplitudes of spikes into the weights that the spikes meet, the last part of a conversion.

        A neuron whose spikes meet something else than a layer, or leave the network, multiplies them itself
        (``scaled``). Its output has no source then, which can reveal further neurons: a sum of spikes that was seen as
        spikes of another source. So the network is traced until no further neuron is found.
        """
        self._trace()  # a first time to learn which layers run several times
        before, found = -1, 0
        while before != found:
            for output in self._trace():
                if isinstance(output.source, DelayedNeuron):
                    output.source.scaled = True
            before, found = found, sum(neuron.scaled for neuron in self.neurons().values())
        for name, layer in self.layers().items():
            source = self.runtime.sources.get(name)
            if layer.role == "synapse" and isinstance(source, DelayedNeuron):
                layer.absorb(source.amplitude)
        self.runtime.converting = False
