"""What a converted network does at the moment: counting, stepping, or being traced."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from qsd.spiking.clock import Clock

Mode = Literal["count", "step", "trace", "clock"]

# The source of a tensor that is an image, or computed from nothing else: the same in every step.
IMAGE = object()
DelayChoice = Callable[[str, int], int]


@dataclass
class Trace:
    """What a simulation recorded. Names are those of the trained model's neurons, see `call_names`.

    Attributes:
        logits: the network's output ``[B, classes]``, accumulated over its window (of a network with several
            outputs: the same structure of tensors).
        spikes: binary spikes ``[T, B, ...]`` (bool) of the recorded neurons, in their own window.
        counts: their sums over the window ``[B, ...]`` (uint8).
        membrane: their potentials after each step's charge ``[T + delay, B, ...]``.
        latency: steps from the first of the image to the last of the output on one global clock.
    """

    logits: Any
    latency: int
    spikes: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    membrane: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Stream:
    """What a clocked run gave.

    Attributes:
        logits: outputs ``[B, classes]`` of every image, in order.
        finished: tick in which each was complete.
        latency: ticks from an image's first to its output's last.
        interval: ticks between two images.
        counts: of the recorded neurons, ``[B, ...]`` (uint8) for every image.
    """

    logits: list[Tensor]
    finished: list[int]
    latency: int
    interval: int
    counts: dict[str, list[Tensor]] = field(default_factory=dict)


class Runtime:
    """Shared by all layers of one converted network: the mode, the window, and what is recorded.

    Args:
        time_steps: T of the network.
    """

    def __init__(self, time_steps: int) -> None:
        self.time_steps = time_steps
        self.mode: Mode = "count"
        self.batch = 0
        self.delay = delay_choice(None)
        self.record: tuple[str, ...] = ()
        # While tracing: the neuron whose spikes each synapse sees (`None`: something else), by the synapse's name.
        self.sources: dict[str, Any] = {}
        self.occupation: dict[str, int] = {}
        self.calls: Counter[str] = Counter()  # of every layer in this pass
        self.repeated: frozenset[str] = frozenset()  # layers that run several times in a pass
        self.converting = True  # while it is still open which neurons' amplitudes go into weights
        self.clock = Clock(time_steps, 0, 1)
        self.on_counts: Callable[[str, Tensor], None] | None = None
        self.trace = Trace(torch.empty(0), 0)

    @contextmanager
    def running(self, mode: Mode, delay: DelayChoice | None = None, batch: int = 0) -> Iterator[None]:
        """Run the network in a mode, then return to the one before, with what was recorded and how.

        Args:
            mode: what layers are to do.
            delay: chooses a neuron's delay by its name and the stored one; ``None`` for the stored one.
            batch: B of the images, if steps are taken.
        """
        before = self.mode, self.delay, self.batch, self.record, self.trace, self.calls
        self.mode, self.delay, self.batch, self.calls = mode, delay or delay_choice(None), batch, Counter()
        try:
            yield
        finally:
            self.mode, self.delay, self.batch, self.record, self.trace, self.calls = before

    @contextmanager
    def counting(self, counts: dict[str, Tensor] | Callable[[str, Tensor], None]) -> Iterator[None]:
        """Put every neuron's counts ``[B, ...]`` of a run into a dictionary, or hand them to a function.

        Args:
            counts: by names as `call_names` makes them.
        """
        self.on_counts = counts.__setitem__ if isinstance(counts, dict) else counts
        try:
            yield
        finally:
            self.on_counts = None

    def aligned(self, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], int]:
        """Tensors of one window: those that arrive earlier wait (on the clock), and all arrive with the latest.

        Args:
            inputs: what an operation or a layer is given, tensors and others.

        Returns:
            The same in order, and the step at which the common window begins.
        """
        arrival = max((x.arrival for x in inputs if is_marked(x)), default=0)
        if self.mode != "clock" or all(x.arrival == arrival for x in inputs if is_marked(x)):
            return inputs, arrival

        def wait(x: Any) -> Any:
            if not is_marked(x) or x.arrival == arrival:
                return x
            return TracedTensor.mark(self.clock.hold(plain(x), arrival - x.arrival), x.source, arrival, self)

        return tuple(wait(x) for x in inputs), arrival

    def call(self, name: str) -> str:
        """Begin a layer's next call of this pass, and name it: see `call_names`.

        Args:
            name: dotted name in the trained model.
        """
        number = self.calls[name]
        self.calls[name] += 1
        return f"{name}@{number}" if name in self.repeated else name

    def is_constant(self, x: Tensor) -> bool:
        """Whether a tensor has no time axis yet: an image, a current that is the same in all T steps.

        Args:
            x: ``[B, ...]``, or ``[T * B, ...]`` with the steps in front.
        """
        return x.shape[0] != self.time_steps * self.batch

    def split(self, x: Tensor) -> Tensor:
        """``[T * B, ...]`` to ``[T, B, ...]``.

        Args:
            x: a tensor with time and batch in its first axis.
        """
        return x.reshape(self.time_steps, self.batch, *x.shape[1:])


def matches(call: str, patterns: Iterable[str]) -> bool:
    """Whether a name, or a glob, means a call: by the layer's name all of its calls.

    Args:
        call: as `call_names` names it.
        patterns: names and globs.
    """
    name = call.partition("@")[0]
    return any(fnmatchcase(name, pattern) or fnmatchcase(call, pattern) for pattern in patterns)


def call_names(names: Sequence[str]) -> list[str]:
    """Names of calls, in their order: what is called once keeps its name, what is called again is numbered.

    A head that is shared by the levels of a pyramid runs once per level: ``name@0``, ``name@1``, ...

    Args:
        names: of the layers, in the order of their calls.
    """
    total, seen = Counter(names), Counter[str]()
    found = []
    for name in names:
        found.append(f"{name}@{seen[name]}" if total[name] > 1 else name)
        seen[name] += 1
    return found


def delay_choice(delay: int | Mapping[str, int] | None) -> DelayChoice:
    """How a delay argument answers for a neuron: one number for all, names and globs, or what is stored.

    Args:
        delay: steps by which neurons wait after their input begins; a mapping's last match counts.
    """
    if delay is None:
        return lambda _name, stored: stored
    if isinstance(delay, int):
        return lambda _name, _stored: delay
    patterns = list(delay.items())

    def choose(name: str, stored: int) -> int:
        return next((steps for pattern, steps in reversed(patterns) if fnmatchcase(name, pattern)), stored)

    return choose


class TracedTensor(torch.Tensor):
    """A tensor that knows whose spikes it holds and when it arrives on a global clock.

    Attributes:
        source: the neuron whose spikes these are, perhaps rearranged, `IMAGE` for what is computed from images alone,
            or ``None`` for a current. A neuron whose spikes meet any other operation than a rearrangement or one of
            our layers is told so (``scaled``).
        arrival: step at which its window begins.
        runtime: of the network.
    """

    source: Any
    arrival: int
    runtime: Runtime

    _REARRANGEMENTS = frozenset(
        {
            "reshape", "view", "flatten", "permute", "transpose", "contiguous", "unsqueeze", "squeeze", "__getitem__",
            "clone", "detach", "unflatten", "movedim", "dropout", "to", "double", "float", "__get__", "as_subclass",
            "pixel_shuffle",
        }
    )  # fmt: skip

    @classmethod
    def mark(cls, x: Tensor, source: Any, arrival: int, runtime: Runtime) -> "TracedTensor":
        """Give a tensor its marks.

        Args:
            x: any tensor.
            source: see the class.
            arrival: see the class.
            runtime: see the class.
        """
        marked = x.as_subclass(cls)
        marked.source, marked.arrival, marked.runtime = source, arrival, runtime
        return marked

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves, structure = tree_flatten((args, kwargs or {}))
        marked = [x for x in leaves if is_marked(x)]
        if not marked:
            return super().__torch_function__(func, types, args, kwargs or {})
        runtime = marked[0].runtime
        aligned, arrival = runtime.aligned(tuple(leaves))
        args, kwargs = tree_unflatten(aligned, structure)
        result = super().__torch_function__(func, types, args, kwargs)
        results = [x for x in tree_leaves(result) if isinstance(x, TracedTensor)]
        keeps = getattr(func, "__name__", "") in cls._REARRANGEMENTS
        image = all(x.source is IMAGE for x in marked)
        for x in results:
            x.source = marked[0].source if keeps else IMAGE if image else None
            x.arrival, x.runtime = arrival, runtime
        if results and not keeps and runtime.converting:
            for x in marked:
                if x.source is not None and x.source is not IMAGE:
                    x.source.scaled = True
        return result


def is_marked(x: Any) -> bool:
    """Whether something is a tensor with marks.

    Args:
        x: anything.
    """
    return isinstance(x, TracedTensor) and hasattr(x, "source")


def plain(x: Any) -> Any:
    """A tensor without marks, and anything else as it is.

    Args:
        x: anything.
    """
    return x.as_subclass(Tensor) if isinstance(x, Tensor) else x
