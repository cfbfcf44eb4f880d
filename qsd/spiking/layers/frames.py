"""Recordings in time: event counts as binary spikes, and frames that follow one another on one clock."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qsd.layers.frames import EventCounts, FrameAxis
from qsd.spiking.clock import Window
from qsd.spiking.layers.base import TimedLayer
from qsd.spiking.layers.costs import LayerInputs, Operations
from qsd.spiking.layers.movement import Movement, Signal
from qsd.spiking.names import matches
from qsd.spiking.runtime import Runtime
from qsd.spiking.steps import shift


class SpikingEvents(TimedLayer):
    """Sends event counts into the network: as that many spikes, or as the digits of the binary code.

    It has no membrane and no delay: the events of a bin arrive in the steps of its window. Spikes are 0 or 1. Where
    they meet an operation that is no layer of the engine (``scaled``), they have their value.

    Args:
        trained: The trained layer.
        name: Its dotted name in the trained model.
        runtime: Runtime of the converted network.
    """

    role = "neuron"

    def __init__(self, trained: EventCounts, name: str, runtime: Runtime) -> None:
        super().__init__(name, runtime)
        self.counts = trained.counts
        self.time_steps, self.amplitude, self.scaled = trained.time_steps, 1.0, False

    def source(self) -> "SpikingEvents | None":
        return None if self.scaled else self

    def operations(self, inputs: LayerInputs) -> Operations | None:
        del inputs
        return None  # The sensor has counted.

    def movement(self, inputs: LayerInputs, output: Tensor, operations: Operations | None) -> Movement:
        del inputs, output, operations  # The first layer reads the events, and no membrane is updated.
        largest = self.runtime.time_steps
        return Movement({}, Signal(largest, largest, signed=False, sources=(self.call,)))

    def stored_bits(self, weight_bits: Mapping[str, int], merged_bits: int | None) -> float:
        del weight_bits, merged_bits
        return 0.0

    def count(self, *inputs: Tensor) -> Tensor:
        counts = self.counts(inputs[0])
        self.runtime.hand_out(self.call, counts)
        return counts

    def step(self, constant: bool, *inputs: Tensor) -> Tensor:
        del constant
        run, code, counts = self.runtime.run, self.runtime.code, self.counts(inputs[0])
        spikes = code.digits(counts)
        run.trace.counts[self.call] = code.counts(spikes)
        if matches(self.call, run.record):
            run.trace.spikes[self.call], run.trace.membrane[self.call] = spikes.bool(), spikes[:0]
        spikes = spikes.flatten(0, 1)
        return code.weigh(spikes) if self.scaled else spikes

    def tick(self, window: Window, *inputs: Tensor) -> Tensor:
        code, step, counts = self.runtime.code, window.step, self.counts(inputs[0])
        if not window.open:
            return counts.zero_()
        if step == code.steps:
            self.runtime.hand_out(self.call, counts)
        spikes = code.digits(counts)[step - 1]
        return shift(spikes, code.places(step)) if self.scaled else spikes


class SpikingFrameAxis(FrameAxis):
    """Frames as images; on the clock, and where one frame runs alone, there is nothing to fold.

    Args:
        trained: The trained layer.
        runtime: Runtime of the converted network.
    """

    def __init__(self, trained: FrameAxis, runtime: Runtime) -> None:
        super().__init__(trained.frames, trained.mode)
        self.runtime = runtime

    def forward(self, x: Tensor) -> Tensor:
        """As `FrameAxis`; one frame ``[B, C, H, W]`` as it is."""
        alone = self.passes > 1 and self.runtime.mode == "clock"
        single = self.mode != "channels" and self.runtime.run.remainders is not None
        return x if alone or single else super().forward(x)


class SpikingFrameMean(nn.Module):
    """The mean of the output over the frames.

    On the clock `SpikingNetwork.stream` takes it, and where frames run one by one, whoever runs them.

    Args:
        frames: Number F of frames.
        runtime: Runtime of the converted network.
    """

    def __init__(self, frames: int, runtime: Runtime) -> None:
        super().__init__()
        self.frames, self.runtime = frames, runtime

    def forward(self, output: Any) -> Any:
        """``[F * B, ...]``, in time steps ``[steps * F * B, ...]``, to the same without the frames."""
        if self.runtime.mode == "clock" or self.runtime.run.remainders is not None:
            return output
        steps = self.runtime.code.steps if self.runtime.mode == "step" else 1
        return tree_map_only(Tensor, lambda x: x.unflatten(0, (steps, self.frames, -1)).mean(1).flatten(0, 1), output)
