"""State that the layers of one converted network share: the present run, and the results of tracing."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from qsd.spiking.clock import Clock
from qsd.spiking.codes import Code, CodeName, build_code
from qsd.spiking.names import DelayChoice, delay_choice
from qsd.spiking.results import Trace
from qsd.spiking.signals import MarkedTensor, is_marked, plain

# How layers run: in the count domain (``count``), in time steps, a layer at a time (``step``), in ticks of one global
# clock (``clock``), or in the count domain on marked tensors, to learn sources and arrivals (``trace``).
Mode = Literal["count", "step", "trace", "clock"]


@dataclass
class Run:
    """One run of the network.

    Attributes:
        mode: How layers run.
        delay: Chooses a neuron's delay by its name and its stored delay.
        record: Names and globs of the neurons whose spikes and membranes are recorded.
        trace: Receives counts and recordings, in time steps.
        clock: The global clock, in ticks.
        calls: Number of calls of every layer up to now.
        codes: By layer the codes of its inputs in the present call.
    """

    mode: Mode = "count"
    delay: DelayChoice = field(default_factory=lambda: delay_choice(None))
    record: tuple[str, ...] = ()
    trace: Trace = field(default_factory=lambda: Trace(torch.empty(0), 0))
    clock: Clock = field(default_factory=lambda: Clock(1, 0, 1))
    calls: Counter[str] = field(default_factory=Counter)
    codes: dict[str, tuple[Code, ...]] = field(default_factory=dict)


class Runtime:
    """Shared by all layers of one converted network.

    Tracing fills ``sources`` (by a layer's name the neuron whose spikes it sees), ``busy_steps`` (by call the time
    steps for which an image occupies the layer's state) and ``repeated`` (layers that run several times in a pass).

    Args:
        time_steps: T of the network, the largest spike count.
        code: How a count travels as binary spikes; it decides how many steps a window has.
    """

    def __init__(self, time_steps: int, code: CodeName = "unary") -> None:
        self.time_steps = time_steps
        self.code: Code = build_code(code, time_steps)
        self.run = Run()
        self.sources: dict[str, Any] = {}
        self.busy_steps: dict[str, int] = {}
        self.repeated: frozenset[str] = frozenset()
        self.converting = True  # while it is still open which neurons' amplitudes go into weights
        self.on_counts: Callable[[str, Tensor], None] | None = None

    @property
    def mode(self) -> Mode:
        """How layers run at present."""
        return self.run.mode

    @contextmanager
    def running(self, mode: Mode, delay: DelayChoice | None = None, **more: Any) -> Iterator[Run]:
        """Begin a run, and return to the one before at its end.

        Args:
            mode: How layers are to run.
            delay: Chooses a neuron's delay by its name and its stored delay; ``None`` for the stored one.
            more: Further fields of `Run`.
        """
        before = self.run
        self.run = Run(mode, delay or delay_choice(None), **more)
        try:
            yield self.run
        finally:
            self.run = before

    @contextmanager
    def counting(self, counts: dict[str, Tensor] | Callable[[str, Tensor], None]) -> Iterator[None]:
        """Collect the counts ``[B, ...]`` of every neuron.

        Args:
            counts: Dictionary to put them into by call (see `call_names`), or a function that gets call and counts.
        """
        self.on_counts = counts.__setitem__ if isinstance(counts, dict) else counts
        try:
            yield
        finally:
            self.on_counts = None

    def hand_out(self, call: str, counts: Tensor) -> None:
        """Pass the counts of a neuron's call to whoever collects them.

        Args:
            call: Name of the call.
            counts: ``[B, ...]``.
        """
        if self.on_counts is not None:
            self.on_counts(call, counts)

    def aligned(self, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], int]:
        """Bring signals to one window: on the clock, those that arrive earlier wait for the latest.

        Args:
            inputs: Arguments of an operation or of a layer, tensors and others.

        Returns:
            The arguments in the same order, and the time step at which their common window begins.
        """
        arrival = max((x.arrival for x in inputs if is_marked(x)), default=0)
        if self.mode != "clock" or all(x.arrival == arrival for x in inputs if is_marked(x)):
            return inputs, arrival

        def wait(x: Any) -> Any:
            if not is_marked(x) or x.arrival == arrival:
                return x
            return MarkedTensor.mark(self.run.clock.hold(plain(x), arrival - x.arrival), x.source, arrival, self)

        return tuple(wait(x) for x in inputs), arrival

    def call(self, name: str) -> str:
        """Begin a layer's next call of this pass and return its name, see `call_names`.

        Args:
            name: Dotted name of the layer in the trained model.
        """
        number = self.run.calls[name]
        self.run.calls[name] += 1
        return f"{name}@{number}" if name in self.repeated else name

    def code_of(self, x: Any) -> Code:
        """The code of a signal: a neuron's spikes are digits; currents, and spikes with a value, add up as they are.

        Args:
            x: An input of a layer.
        """
        return self.code.plain if getattr(x, "source", None) is None else self.code

    def split(self, x: Tensor) -> Tensor:
        """Give the steps of the window their own axis: ``[steps * B, ...]`` to ``[steps, B, ...]``.

        Args:
            x: A tensor with time and batch in its first axis.
        """
        steps = self.code.steps
        return x.reshape(steps, x.shape[0] // steps, *x.shape[1:])
