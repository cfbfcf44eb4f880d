"""State that the layers of one converted network share: the present run, and the results of tracing.

A run belongs to the thread that began it, so that one network serves several threads at once.
"""

import threading
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
class Paths:
    """What tracing finds.

    Attributes:
        sources: By a layer's name the source of what it sees, see `qsd.spiking.signals`.
        busy_steps: By call the time steps for which an image occupies the layer's state.
    """

    sources: dict[str, Any] = field(default_factory=dict)
    busy_steps: dict[str, int] = field(default_factory=dict)


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
        present: Name of every layer's present call.
        paths: Receives what is found, while tracing.
        codes: By layer the codes of its inputs in the present call.
        remainders: Of one frame in the count domain, the remainder of every neuron with a memory, in thresholds: that
            of the frame before, which the neurons replace by their own. ``None`` where all frames run at once.
    """

    mode: Mode = "count"
    delay: DelayChoice = field(default_factory=lambda: delay_choice(None))
    record: tuple[str, ...] = ()
    trace: Trace = field(default_factory=lambda: Trace(torch.empty(0), 0))
    clock: Clock = field(default_factory=lambda: Clock(1, 0, 1))
    calls: Counter[str] = field(default_factory=Counter)
    codes: dict[str, tuple[Code, ...]] = field(default_factory=dict)
    present: dict[str, str] = field(default_factory=dict)
    paths: Paths = field(default_factory=Paths)
    remainders: dict[str, Tensor] | None = None


class _Thread(threading.local):
    """The run of the present thread. Copies and pickles of a network begin without any."""

    def __init__(self) -> None:
        self.run = Run()
        self.on_counts: Callable[[str, Tensor], None] | None = None

    def __reduce__(self) -> tuple[type["_Thread"], tuple[()]]:
        return _Thread, ()


class Runtime:
    """Shared by all layers of one converted network.

    Tracing replaces ``paths`` and ``repeated`` (layers that run several times in a pass) when it is complete.

    Args:
        time_steps: T of the network, the largest spike count.
        code: How a count travels as binary spikes; it decides how many steps a window has.
    """

    def __init__(self, time_steps: int, code: CodeName = "unary") -> None:
        self.time_steps = time_steps
        self.code: Code = build_code(code, time_steps)
        self.paths = Paths()
        self.repeated: frozenset[str] = frozenset()
        self.frames = 1  # images that follow one another as the frames of one recording
        self.converting = True  # while it is still open which neurons' amplitudes go into weights
        self._thread = _Thread()

    @property
    def run(self) -> Run:
        """The present run of this thread."""
        return self._thread.run

    @property
    def mode(self) -> Mode:
        """How layers run at present."""
        return self.run.mode

    @property
    def sources(self) -> dict[str, Any]:
        """By a layer's name the source of what it sees: while tracing what is found so far."""
        return self.run.paths.sources if self.mode == "trace" else self.paths.sources

    @contextmanager
    def running(self, mode: Mode, delay: DelayChoice | None = None, **more: Any) -> Iterator[Run]:
        """Begin a run, and return to the one before at its end.

        Args:
            mode: How layers are to run.
            delay: Chooses a neuron's delay by its name and its stored delay; ``None`` for the stored one.
            more: Further fields of `Run`.
        """
        thread = self._thread
        before = thread.run
        thread.run = Run(mode, delay or delay_choice(None), **more)
        try:
            yield thread.run
        finally:
            thread.run = before

    @contextmanager
    def counting(self, counts: dict[str, Tensor] | Callable[[str, Tensor], None]) -> Iterator[None]:
        """Collect the counts ``[B, ...]`` of every neuron.

        Args:
            counts: Dictionary to put them into by call (see `call_names`), or a function that gets call and counts.
        """
        self._thread.on_counts = counts.__setitem__ if isinstance(counts, dict) else counts
        try:
            yield
        finally:
            self._thread.on_counts = None

    @property
    def collects(self) -> bool:
        """Whether somebody collects counts in this thread, see `counting`."""
        return self._thread.on_counts is not None

    def hand_out(self, call: str, counts: Tensor) -> None:
        """Pass the counts of a neuron's call to whoever collects them.

        Args:
            call: Name of the call.
            counts: ``[B, ...]``.
        """
        on_counts = self._thread.on_counts
        if on_counts is not None and self.mode != "trace":
            on_counts(call, counts)

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
        run = self.run
        number = run.calls[name]
        run.calls[name] += 1
        run.present[name] = f"{name}@{number}" if name in self.repeated else name
        return run.present[name]

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
