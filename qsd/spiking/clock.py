"""One global clock for a whole converted network, through which images follow one another.

Every signal has a window offset ``arrival`` and carries image k (counted from 0, ``interval`` steps apart) in ticks
``arrival + k * interval + 1 .. arrival + k * interval + T``. Signals that meet are aligned: the earlier one waits in a
queue, as a chip would hold the current of a residual connection until its branch arrives.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Window:
    """Where a tick lies in the window of a layer's input.

    Attributes:
        step: 1 in the first tick of an image's window; 0 while no image is there.
        time_steps: T.
        constant: the input is an image, there for the whole window.
        state: what the layer keeps between ticks.
    """

    step: int
    time_steps: int
    constant: bool
    state: dict[str, Tensor]

    @property
    def begins(self) -> bool:
        """A new image begins in this tick."""
        return self.step == 1

    @property
    def open(self) -> bool:
        """Input of an image arrives in this tick."""
        return self.within(0, self.time_steps)

    def within(self, after: int, length: int) -> bool:
        """Whether the tick is one of ``length`` that begin ``after`` ticks behind the window's start.

        Args:
            after: in ticks.
            length: in ticks.
        """
        return after < self.step <= after + length


@dataclass
class Clock:
    """State of a clocked run.

    Attributes:
        time_steps: T.
        images: how many follow one another.
        interval: ticks from one to the next.
        tick: the present one, from 1.
    """

    time_steps: int
    images: int
    interval: int
    tick: int = 0
    _states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _queues: list[deque[Tensor]] = field(default_factory=list)
    _site: int = 0

    def advance(self) -> None:
        """Begin the next tick."""
        self.tick += 1
        self._site = 0

    def image(self, arrival: int) -> tuple[int, int]:
        """Number of the image that a signal carries, and the step of its window (0: none).

        Args:
            arrival: the signal's offset.
        """
        number, step = divmod(self.tick - arrival - 1, self.interval)
        return (number, step + 1) if 0 <= number < self.images else (number, 0)

    def window(self, name: str, arrival: int, constant: bool) -> Window:
        """The present tick as a layer sees it.

        Args:
            name: of the layer.
            arrival: its input's offset.
            constant: whether the input is an image.
        """
        return Window(self.image(arrival)[1], self.time_steps, constant, self._states.setdefault(name, {}))

    def hold(self, x: Tensor, ticks: int) -> Tensor:
        """What went in here so many ticks ago (zeros at first). Calls are told apart by their order in a tick.

        Args:
            x: a signal.
            ticks: to wait.
        """
        if self._site == len(self._queues):
            self._queues.append(deque([torch.zeros_like(x)] * ticks))
        queue = self._queues[self._site]
        self._site += 1
        queue.append(x)
        return queue.popleft()
