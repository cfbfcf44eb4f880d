"""One global clock for a whole converted network, through which images follow one another.

Every signal has a window offset ``arrival`` and carries image k (counted from 0, ``interval`` steps apart) in ticks
``arrival + k * interval + 1 .. arrival + k * interval + steps``, where a window has T steps in the unary code and fewer
in the binary one. Signals that meet are aligned: the earlier one waits in a queue, as a chip would hold the current of
a residual connection until its branch arrives.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Window:
    """The place of a tick in the window of a layer's input.

    Attributes:
        step: 1 in the first tick of an image's window; 0 while no image is present.
        time_steps: Steps of a window.
        constant: Whether the input is an image, which is present for the whole window.
        state: State of the layer, kept between ticks.
        first: Whether the image is the first frame of a recording; a single image is.
    """

    step: int
    time_steps: int
    constant: bool
    state: dict[str, Any]
    first: bool = True

    @property
    def begins(self) -> bool:
        """Whether a new image begins in this tick."""
        return self.step == 1

    @property
    def open(self) -> bool:
        """Whether input of an image arrives in this tick."""
        return self.within(0, self.time_steps)

    def within(self, after: int, length: int) -> bool:
        """Whether the tick is one of ``length`` ticks that begin ``after`` ticks later than the window.

        Args:
            after: Number of ticks.
            length: Number of ticks.
        """
        return after < self.step <= after + length


@dataclass
class Clock:
    """State of a clocked run.

    Attributes:
        time_steps: Steps of a window.
        images: Number of images that follow one another.
        interval: Ticks from one image to the next.
        frames: Images that are the frames of one recording.
        tick: Number of the present tick, from 1.
    """

    time_steps: int
    images: int
    interval: int
    frames: int = 1
    tick: int = 0
    _states: dict[str, dict[str, Any]] = field(default_factory=dict)
    _queues: list[deque[Tensor]] = field(default_factory=list)
    _site: int = 0

    def advance(self) -> None:
        """Begin the next tick."""
        self.tick += 1
        self._site = 0

    def image(self, arrival: int) -> tuple[int, int]:
        """Number of the image that a signal carries, and the step of its window (0: none).

        Args:
            arrival: Window offset of the signal.
        """
        number, step = divmod(self.tick - arrival - 1, self.interval)
        return (number, step + 1) if 0 <= number < self.images else (number, 0)

    def window(self, name: str, arrival: int, constant: bool) -> Window:
        """The present tick as a layer sees it.

        Args:
            name: Name of the layer's call.
            arrival: Window offset of its input.
            constant: Whether the input is an image.
        """
        number, step = self.image(arrival)
        state = self._states.setdefault(name, {})
        return Window(step, self.time_steps, constant, state, number % self.frames == 0)

    def hold(self, x: Tensor, ticks: int) -> Tensor:
        """Delay a signal; zeros come out at first. Calls are told apart by their order in a tick.

        Args:
            x: Signal of this tick.
            ticks: Number of ticks to wait.
        """
        if self._site == len(self._queues):
            self._queues.append(deque([torch.zeros_like(x)] * ticks))
        queue = self._queues[self._site]
        self._site += 1
        queue.append(x)
        return queue.popleft()
