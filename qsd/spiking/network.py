"""A converted network, and the ways to run it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from qsd.errors import QsdError
from qsd.models.compact import CompactModel
from qsd.precision import warn_of_rounding
from qsd.spiking.clock import Clock
from qsd.spiking.codes import Code
from qsd.spiking.graphs import Graphs
from qsd.spiking.layers import DelayedNeuron, SpikingChain, TimedLayer
from qsd.spiking.merging import MergeChoice
from qsd.spiking.names import Delay, check_delay, delay_choice, matches
from qsd.spiking.results import Stream, Trace, join_traces
from qsd.spiking.runtime import Paths, Runtime
from qsd.spiking.signals import IMAGE, MarkedTensor, plain
from qsd.spiking.streaming import in_a_row, read_output

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
        self.graphs = Graphs()
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

    @property
    def frames(self) -> int:
        """Frames of a recording that follow one another; 1 for images."""
        return self.runtime.frames

    def has(self, pattern: str) -> bool:
        """Whether a name or glob matches one of the neurons or of their calls, or the layer of event counts.

        Args:
            pattern: Name or glob.
        """
        neurons = {name for name, layer in self.layers().items() if layer.role == "neuron"}
        return any(
            matches(call, [pattern]) for call in self.runtime.paths.busy_steps if call.partition("@")[0] in neurons
        )

    def train(self, mode: bool = True) -> "SpikingNetwork":
        """Stays in evaluation: a converted network is not trained."""
        del mode
        return super().train(False)

    def _apply(self, *args: Any, **options: Any) -> "SpikingNetwork":
        self.graphs.clear()  # they hold the tensors that are replaced
        return super()._apply(*args, **options)

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
        self._check_images(images)
        with self.runtime.running("count"):
            return self.graphs.run(self.network, self.runtime, self.network, images)

    def _check_images(self, images: Tensor, finite: bool = False) -> Tensor:
        """The images, unless the network cannot take them.

        Args:
            images: Input of a run.
            finite: Whether values that are not finite are refused, because binary spikes could not tell of them.

        Raises:
            QsdError: For unbatched images and values that are not finite.
        """
        warn_of_rounding(self, images)
        if images.dim() != self.example.dim():
            raise QsdError(
                f"the input has the shape {list(images.shape)}, which is not that of a batch of {self.example.dim()} "
                "dimensions; add the batch dimension to a single image with images.unsqueeze(0)."
            )
        if finite and not bool((good := torch.isfinite(images)).all()):
            number = int((~good.flatten(1).all(1)).nonzero()[0])
            raise QsdError(f"image {number} of the batch holds values that are not finite; leave it out.")
        return images

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
            images: ``[B, C, H, W]``, or recordings ``[B, F, C, H, W]``; of a network that takes currents, their sums
                over the window.
            delay: Overrides the stored delays: one for all, or by name or glob.
            record: Names or globs of neurons to record; each keeps its spikes and membranes for all steps.

        Returns:
            Output, counts of all neurons, recordings and latency. Counts and recordings of a network over frames are
            those of all frames, ``[F * B, ...]``, the first ones of all samples first.

        Raises:
            QsdError: For an image with values that are not finite, a delay that no neuron can have, and unknown names.
        """
        self._check_images(images, finite=True)
        patterns, latency = self._patterns(record), self.latency(delay)
        # A few images at a time: all steps of a layer lie in memory at once.
        pixels = images.shape[1:].numel() // _VALUES_PER_PIXEL if self.currents else images.shape[-2:].numel()
        pixels *= self.frames
        size = max(1, _PIXELS_AT_A_TIME // (self.code.steps * max(1, pixels)))
        trace = join_traces(
            [self._simulate(part, delay, patterns, latency) for part in images.split(size)], self.frames
        )
        for call, counts in trace.counts.items():
            self.runtime.hand_out(call, counts.to(images.dtype))
        return trace

    def _simulate(self, images: Tensor, delay: Delay, record: tuple[str, ...], latency: int) -> Trace:
        trace = Trace(torch.empty(0), latency)
        with self.runtime.running("step", delay_choice(delay), record=record, trace=trace):
            trace.logits, trace.counts = self.graphs.run(self.network, self.runtime, self._steps, images)
        return trace

    def _steps(self, images: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """Output and counts of all steps, in a run that may begin anew."""
        self.runtime.run.calls.clear()
        # Images are the same in every step and have no time axis; currents come in parts.
        output = self.network(self._mark(self.code.spread(images) if self.currents else images))
        logits = tree_map_only(Tensor, lambda x: self.runtime.split(plain(x)).sum(0), output)
        return logits, dict(self.runtime.run.trace.counts)

    def latency(self, delay: Delay = None) -> int:
        """Time steps on one global clock from the first input step to the last output step.

        The steps of a window plus the delays on the longest path, plus the steps but one for every attention on it
        whose query waits for ``k^T v`` to be complete. The frames of a recording follow one another at the shortest
        `interval`, and the last one's output completes that of the recording.

        Args:
            delay: Overrides the stored delays, as in `simulate`.
        """
        of_image, interval = self._timing(delay)
        return of_image + (self.frames - 1) * interval

    def interval(self, delay: Delay = None) -> int:
        """Fewest steps between two images: the longest time that one occupies a membrane, a running sum or a matrix.

        Args:
            delay: Overrides the stored delays, as in `simulate`.
        """
        return self._timing(delay)[1]

    def _timing(self, delay: Delay) -> tuple[int, int]:
        """Latency of one image and least interval; the network is traced once for every choice of delays."""
        neurons, choose = self.neurons(), delay_choice(delay)
        check_delay(delay, neurons)
        delays = tuple(choose(name, neuron.delay) for name, neuron in neurons.items())
        if delays not in self._timings:
            check_delay(dict(zip(neurons, delays)), neurons)  # the stored ones, which anybody may set
            outputs, paths = self._trace(delay)
            latency = self.code.steps + max(output.arrival for output in outputs)
            self._timings[delays] = latency, max(paths.busy_steps.values())
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
            images: Batches ``[B, C, H, W]`` of one shape, in the order of arrival; of recordings
                ``[B, F, C, H, W]``, whose frames follow one another as images do.
            delay: Overrides the stored delays, as in `simulate`.
            interval: Ticks from one image to the next; ``None`` for the least, see `interval`.
            record: Names or globs of neurons whose counts are kept.

        Returns:
            Outputs, and the ticks in which they were complete. Counts are those of every image or frame.

        Raises:
            QsdError: If the interval is too short, and as `simulate`.
        """
        batches = in_a_row(self.network, [self._check_images(batch, True) for batch in images], self.frames)
        of_image, interval = self._timing(delay)[0], self._interval(delay, interval)
        runtime, patterns, code = self.runtime, self._patterns(record), self.code
        clock = Clock(code.steps, len(batches), interval, self.frames)
        stream = Stream([], [], of_image + (self.frames - 1) * interval, interval)
        latest = code.steps if self.currents else clock.interval  # An image stays, currents end with their window.

        def keep(name: str, counts: Tensor) -> None:
            if matches(name, patterns):
                stream.counts.setdefault(name, []).append(counts.to(torch.uint8))

        with runtime.running("clock", delay_choice(delay), clock=clock) as run, runtime.counting(keep):
            for _ in range((len(batches) - 1) * clock.interval + of_image if batches else 0):
                clock.advance()
                number, step = clock.image(0)
                image = batches[number] if 1 <= step <= latest else torch.zeros_like(batches[0])
                run.calls.clear()
                output = self.network(self._mark(code.part(image, step) if self.currents else image))
                read_output(output, clock, stream, runtime)
        return stream

    def _interval(self, delay: Delay, chosen: int | None) -> int:
        """The chosen interval between images, or the least; one below the least is refused."""
        least = self.interval(delay)
        if chosen is not None and chosen < least:
            busy_steps = self._trace(delay)[1].busy_steps
            busy = max(busy_steps, key=busy_steps.__getitem__)
            raise QsdError(f"interval={chosen} is too short: {busy} is occupied for {least} steps by each image.")
        return least if chosen is None else chosen

    def _mark(self, images: Tensor) -> MarkedTensor:
        return MarkedTensor.mark(images, None if self.currents else IMAGE, 0, self.runtime)

    def _patterns(self, record: str | Iterable[str]) -> tuple[str, ...]:
        patterns = (record,) if isinstance(record, str) else tuple(record)
        for pattern in patterns:
            if not self.has(pattern):
                raise QsdError(
                    f"record={pattern!r} names no neuron; names are {', '.join(list(self.neurons())[:3])}, ..."
                )
        return patterns

    @torch.no_grad()
    def _trace(self, delay: Delay = None) -> tuple[list[MarkedTensor], Paths]:
        with self.runtime.running("trace", delay_choice(delay)) as run:
            output = self.network(self._mark(self.example.clone()))
        self.runtime.paths = run.paths  # at once, since other threads may run the network
        self.runtime.repeated = frozenset(name for name, calls in run.calls.items() if calls > 1)
        outputs = tree_leaves(output)
        if not outputs or not all(isinstance(x, MarkedTensor) for x in outputs):
            found = next((x for x in outputs if not isinstance(x, MarkedTensor)), output)
            raise QsdError(f"the model returns a {type(found).__name__}; only tensors can be converted.")
        return outputs, run.paths

    def absorb_amplitudes(self) -> None:
        """Move the amplitudes of spikes into the weights that the spikes meet, the last part of a conversion.

        A neuron whose spikes meet something else than a layer, or leave the network, multiplies them itself
        (``scaled``). Its output has no source then, which can reveal further neurons: a sum of spikes that was seen as
        spikes of another source. So the network is traced until no further neuron is found.
        """
        self._trace()  # a first time to learn which layers run several times
        before, found = -1, 0
        while before != found:
            for output in self._trace()[0]:
                if isinstance(output.source, DelayedNeuron):
                    output.source.scaled = True
            before, found = found, sum(getattr(layer, "scaled", False) for layer in self.layers().values())
        for name, layer in self.layers().items():
            source = self.runtime.sources.get(name)
            if layer.role == "synapse" and isinstance(source, DelayedNeuron):
                layer.absorb(source.amplitude)
        self.runtime.converting = False
