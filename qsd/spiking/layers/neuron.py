"""The spiking neuron."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qsd.errors import QsdError
from qsd.functional import spike_count
from qsd.neurons import SpikeNeuron
from qsd.recurrence import frame_slack, membrane_potentials
from qsd.spiking.clock import Window
from qsd.spiking.layers.base import TimedLayer
from qsd.spiking.layers.costs import LayerInputs, Operations
from qsd.spiking.layers.movement import Movement
from qsd.spiking.layers.spike_movement import neuron_movement
from qsd.spiking.names import matches
from qsd.spiking.runtime import Runtime
from qsd.spiking.steps import charge, fire, fire_half_even, shift

Potential = float | Tensor

_NEURONS_AT_A_TIME = 2**16


class DelayedNeuron(TimedLayer):
    """Delayed integrate-and-fire neuron: charges in all steps of its window, and may fire in as many steps, d later.

    At ``d >= T - 1`` it fires exactly the trained neuron's count, for every input (theorem: all input is in before the
    first chance to fire, and T chances follow). In the binary code it fires the count's digits: the threshold of a step
    is the value of its spike. Spikes are 0 or 1. Their amplitude lies in the weights of the next layer. Where the
    spikes meet an operation that is no layer of the engine (``scaled``), they are multiplied by it, and by their value,
    here, which is exact too, but not spike-driven.

    A neuron with a memory keeps what it did not fire: the window of the next frame starts at half a threshold plus the
    decay times the remainder. So its counts are those of the trained neuron, frame by frame. In the binary code the
    excess above saturation is kept beside the membrane, and belongs to the remainder.

    A neuron whose input is a product of spikes gets, beside the integer currents, the value of their unit. Its
    threshold is divided by that value, anew for every size of the image.

    A neuron of other dynamics overrides `threshold_at`, `limit`, `start`, `charge`, `fire` and, for the count domain,
    `spike_counts`. Steps and ticks are composed of these, so that they agree by construction.

    Args:
        trained: The trained neuron.
        name: Its dotted name in the trained model.
        delay: d, in time steps.
        runtime: Runtime of the converted network.
    """

    role = "neuron"

    def __init__(self, trained: SpikeNeuron, name: str, delay: int, runtime: Runtime) -> None:
        super().__init__(name, runtime)
        self.delay = delay
        self.time_steps, self.threshold, self.amplitude = trained.time_steps, trained.threshold, trained.amplitude
        self.drive, self.rule, self.memory = trained.drive, trained.rule, trained.memory
        self.scaled = False

    def step_size(self, features: int) -> float:
        """The input that one spike stands for, as the neurons of `qsd.neurons` tell it.

        Args:
            features: Size of the layer; without effect.
        """
        del features
        return self.threshold

    # -- dynamics ------------------------------------------------------------------------------------------------------

    def threshold_at(self, scale: float = 1.0) -> Potential:
        """The threshold in units of the input.

        A tensor that broadcasts to one time step of the input, ``[B, ...]``, gives every neuron its own threshold.

        Args:
            scale: Value of one unit of the input, where the input is a product of spikes.
        """
        return self.threshold / scale

    def limit(self, threshold: Potential) -> Potential:
        """The threshold as `fire` gets it; a tensor that broadcasts to one time step may be changed there, in place.

        Args:
            threshold: See `threshold_at`.
        """
        return threshold

    def start(self, threshold: Potential) -> Potential:
        """The membrane potential at the beginning of a window; half a threshold rounds to the nearest count.

        Args:
            threshold: See `threshold_at`.
        """
        return threshold / 2

    def charge(self, membrane: Tensor, current: Tensor) -> None:
        """Add a step's current to the membrane, in place.

        Args:
            membrane: Potential of some neurons.
            current: Their input of this step, in the same shape.
        """
        charge(membrane, current)

    def fire(self, membrane: Tensor, threshold: Any, spikes: Tensor) -> None:
        """Write this step's spikes, and lower the membrane where a neuron fires, in place.

        Args:
            membrane: Potential of some neurons after the charge.
            threshold: A number, or a tensor of the same shape, see `limit`; in the binary code times the value
                of the step's spike.
            spikes: Receives 0 and 1, in the same shape and type.
        """
        fire(membrane, threshold, spikes)

    def spike_counts(self, x: Tensor, *scale: float) -> Tensor:
        """The counts that the neuron fires at the lossless delay, in closed form.

        Args:
            x: Input, accumulated over the window ``[B, ...]``.
            scale: Value of one unit of the input, where the input is a product of spikes.
        """
        threshold = self.threshold_at(*scale)
        drive = x / threshold if scale else self.drive(x)
        rule = self.rule._replace(slack=self._slack(x, threshold))
        remainders = self.runtime.run.remainders
        if self.memory is not None and remainders is not None:
            if (left := remainders.get(self.call)) is not None:
                drive = drive + self.memory.decay * left
            counts = spike_count(drive, self.time_steps, rule)
            remainders[self.call] = drive - counts
            return counts
        if self.memory is not None:
            drive = membrane_potentials(drive, self.time_steps, self.memory, rule)
        return spike_count(drive, self.time_steps, rule)

    def _slack(self, x: Tensor, threshold: Potential) -> float:
        return frame_slack(x, self.time_steps, threshold, self.memory)

    def _start(self, threshold: Potential, x: Tensor) -> Potential:
        """The beginning of a window without a remainder, with the slack for ties."""
        start, slack = self.start(threshold), self._slack(x, threshold)
        return start + slack * threshold if slack and not self.rule.half_even else start

    # -- the three ways to run -----------------------------------------------------------------------------------------

    def window_offset(self) -> int:
        delay = self.runtime.run.delay(self.name, self.delay)
        self.runtime.code.check_delay(self.name, delay)
        return delay

    def busy_steps(self) -> int:
        return self.runtime.code.steps + self.window_offset()

    def check_sources(self, *inputs: Any) -> None:
        # Between two neurons there are no weights that could take the amplitude.
        source = getattr(inputs[0], "source", None)
        if isinstance(source, DelayedNeuron) and self.runtime.converting:
            source.scaled = True

    def source(self) -> "DelayedNeuron | None":
        return None if self.scaled else self

    def operations(self, inputs: LayerInputs) -> Operations | None:
        del inputs
        return None  # updates of membranes are in no convention of the field

    def movement(self, inputs: LayerInputs, output: Tensor, operations: Operations | None) -> Movement:
        del operations
        return neuron_movement(inputs, output / self.amplitude if self.scaled else output, self.call)

    def stored_bits(self, weight_bits: Mapping[str, int], merged_bits: int | None) -> float:
        del weight_bits, merged_bits
        return 0.0  # one threshold for a whole layer

    def _emit(self, spikes: Tensor) -> Tensor:
        return spikes * self.amplitude if self.scaled else spikes

    def count(self, *inputs: Any) -> Tensor:
        counts = self.spike_counts(*inputs)
        self.runtime.hand_out(self.call, counts)
        return self._emit(counts)

    def step(self, constant: bool, *inputs: Any) -> Tensor:
        x, *scale = inputs
        if constant:
            raise self._sees_an_image()
        run, code = self.runtime.run, self.runtime.code
        threshold, records = self.threshold_at(*scale), matches(self.call, run.record)
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        currents = self.runtime.split(x)
        start = self._start(threshold, x)
        if self.memory is None or self.memory.frames == 1:
            spikes, potentials, _ = self._window(currents, start, threshold, records)
        else:
            spikes, potentials = self._windows(currents, start, threshold, records)
        run.trace.counts[self.call] = code.counts(spikes)
        if records:
            run.trace.spikes[self.call], run.trace.membrane[self.call] = spikes.bool(), potentials
        spikes = spikes.flatten(0, 1)
        return self._emit(code.weigh(spikes) if self.scaled else spikes)

    def _windows(
        self, currents: Tensor, start: Potential, threshold: Potential, records: bool
    ) -> tuple[Tensor, Tensor]:
        """Spikes and potentials of all frames, ``[steps, F * B, ...]``, one window after the other."""
        assert self.memory is not None
        first, found = start, []
        for current in currents.chunk(self.memory.frames, dim=1):
            spikes, potentials, left = self._window(current.contiguous(), first, threshold, records)
            found.append((spikes, potentials))
            first = start + self.memory.decay * (left - start)
        return torch.cat([spikes for spikes, _ in found], 1), torch.cat([potentials for _, potentials in found], 1)

    def _window(
        self, currents: Tensor, start: Potential, threshold: Potential, records: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Spikes of a window, potentials after each charge (of no step unless recorded), and the last potential."""
        code, delay = self.runtime.code, self.window_offset()
        spikes, last = torch.empty_like(currents), torch.empty_like(currents[:1])
        shape = (code.steps + delay if records else 0, *currents.shape[1:])
        potentials = currents.new_empty_strided(shape, currents.stride())
        chunks = zip(
            *(_chunks(tensor) for tensor in (currents, spikes, potentials, last)),
            _as_chunks(start, currents[0]),
            _as_chunks(self.limit(threshold), currents[0]),
        )
        for current, spike, potential, end, begin, limit in chunks:
            membrane = begin[0].clone() if isinstance(begin, Tensor) else torch.full_like(current[0], begin)
            limit = limit[0].clone() if isinstance(limit, Tensor) else limit
            excess = None
            for t in range(code.steps + delay):
                if t < code.steps:
                    self.charge(membrane, current[t])
                if records:
                    potential[t] = membrane
                if t == delay and self.memory is not None:
                    excess = code.excess(membrane, limit)
                if t >= delay:
                    self._fire_step(membrane, limit, spike[t - delay], t - delay + 1)
            if self.memory is not None:
                end[0] = membrane if excess is None else membrane + excess
        return spikes, potentials, last[0]

    def _fire_step(self, membrane: Tensor, threshold: Any, spikes: Tensor, step: int) -> None:
        """`fire` in a step of the firing window, as the code says."""
        code = self.runtime.code
        if step == 1:
            code.saturate(membrane, threshold)
        self.fire(membrane, code.level(threshold, step), spikes)

    def tick(self, window: Window, *inputs: Any) -> Tensor:
        x, *scale = inputs
        if window.constant:
            raise self._sees_an_image()
        spikes, delay, state, code = torch.zeros_like(x), self.window_offset(), window.state, self.runtime.code
        step = window.step - delay
        if window.begins:
            threshold = self.threshold_at(*scale)
            start = _filled(self._start(threshold, x), x)
            if self.memory is not None and not window.first:
                left = state["membrane"] if state["excess"] is None else state["membrane"] + state["excess"]
                start += self.memory.decay * (left - start)
            state["membrane"], state["count"] = start, torch.zeros_like(x)
            limit = self.limit(threshold)
            state["threshold"] = _filled(limit, x) if isinstance(limit, Tensor) else limit
        if window.open:
            self.charge(state["membrane"], x)
        if step == 1 and self.memory is not None:
            state["excess"] = code.excess(state["membrane"], state["threshold"])
        if window.within(delay, code.steps):
            self._fire_step(state["membrane"], state["threshold"], spikes, step)
            state["count"] = state["count"] + shift(spikes, code.places(step))
        if step == code.steps:
            self.runtime.hand_out(self.call, state["count"])
        return self._emit(shift(spikes, code.places(step)) if self.scaled else spikes)

    def _sees_an_image(self) -> QsdError:
        return QsdError(
            f"neuron {self.name} sees an image: put a convolution or linear layer of ours before it; if the input is "
            "currents and no image, convert with currents=True."
        )

    def extra_repr(self) -> str:
        return f"time_steps={self.time_steps}, threshold={self.threshold:g}, delay={self.delay}"


class HalfEvenNeuron(DelayedNeuron):
    """A delayed neuron that rounds halves to even counts.

    In the unary code its spikes 1, 3, ... need more than the threshold. In the binary code the last digit needs more
    than the threshold, because it alone tells an odd count from an even one.
    """

    def limit(self, threshold: Potential) -> Potential:
        return threshold if isinstance(threshold, Tensor) else torch.tensor(threshold, dtype=torch.float64)

    def fire(self, membrane: Tensor, threshold: Tensor, spikes: Tensor) -> None:
        fire_half_even(membrane, threshold, spikes)

    def _fire_step(self, membrane: Tensor, threshold: Any, spikes: Tensor, step: int) -> None:
        code = self.runtime.code
        if step == 1:
            code.saturate(membrane, threshold)
        level = code.level(threshold, step)  # in the unary code the same tensor, whose signs tell the parity
        self.fire(membrane, -level if code.radix > 1 and step < code.steps else level, spikes)


def _filled(value: Potential, like: Tensor) -> Tensor:
    """A new tensor in the shape of another, of one value or of values that broadcast."""
    if isinstance(value, Tensor) and (value.dim() or value.is_cuda):
        return torch.empty_like(like).copy_(value)
    return torch.full_like(like, float(value))  # no copy from processor to device, which a CUDA graph cannot record


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Parts of ``[T, B, ...]`` in the order of memory, ``[T, N]``.

    Neurons do not see each other. Some thousands at a time, their membranes stay in the processor's cache. On a CUDA
    device each part would be a launch of its own, so that there is one part.
    """
    size = x.shape[1:].numel() if len(x) else x.stride(0)
    return x.as_strided((len(x), size), (x.stride(0), 1)).split(size if x.is_cuda else _NEURONS_AT_A_TIME, dim=1)


def _as_chunks(value: Potential, like: Tensor) -> Iterator[Any]:
    """A number for every chunk, or the chunks of values that broadcast to one step, in the layout of that step."""
    if isinstance(value, Tensor):
        yield from _chunks(_filled(value, like)[None])
        return
    while True:
        yield value
