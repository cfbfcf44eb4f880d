"""Max-pooling of spikes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qsd.spiking.clock import Window
from qsd.spiking.layers.base import TimedLayer
from qsd.spiking.layers.costs import LayerInputs, Operations, both
from qsd.spiking.layers.movement import Movement
from qsd.spiking.layers.neuron import DelayedNeuron
from qsd.spiking.layers.spike_movement import pool_movement
from qsd.spiking.runtime import Runtime
from qsd.spiking.steps import pool_increment


class SpikingMaxPool(TimedLayer):
    """Max-pool of binary spikes, by temporal decomposition: the growth of the largest of the running sums.

    It is 0 or 1, and adds up to the largest of the counts, whenever the spikes come. At delay T - 1 trains of the unary
    code have no gaps, and "any of them fires" is the same: then no sums are kept. Of binary digits the sums are the
    numbers that the digits form up to now, and the growth is the next digit of the largest count. Padding with zeros is
    padding with nothing, since counts are not negative.

    Args:
        pool: The trained pool.
        name: Its dotted name in the trained model.
        runtime: Runtime of the converted network.
    """

    role = "pool"

    def __init__(self, pool: nn.MaxPool2d, name: str, runtime: Runtime) -> None:
        super().__init__(name, runtime)
        self.pool = pool

    def check_sources(self, *inputs: Tensor) -> None:
        self.runtime.sources[self.name] = getattr(inputs[0], "source", None)

    def source(self) -> Any:
        return self.runtime.sources.get(self.name)

    @property
    def without_gaps(self) -> bool:
        """Whether every spike train that comes in is contiguous from its first step on."""
        neuron, code = self.source(), self.runtime.code
        contiguous = isinstance(neuron, DelayedNeuron) and neuron.window_offset() >= code.lossless_delay
        return contiguous and code.radix == 1

    def count(self, *inputs: Tensor) -> Tensor:
        return self.pool(inputs[0])

    def step(self, constant: bool, *inputs: Tensor) -> Tensor:
        (x,), (code,) = inputs, self.codes
        if constant or self.without_gaps:
            return self.pool(x)
        total = pooled = None
        increments = []
        for spikes in self.runtime.split(x):
            increment, total, pooled = pool_increment(spikes, total, pooled, self.pool, code.radix)
            increments.append(increment)
        return torch.cat(increments)

    def tick(self, window: Window, *inputs: Tensor) -> Tensor:
        (x,), (code,) = inputs, self.codes
        if window.constant or self.without_gaps or not window.open:
            return self.pool(x)
        state = window.state
        if window.begins:
            state.clear()
        increment, state["sum"], state["pooled"] = pool_increment(
            x, state.get("sum"), state.get("pooled"), self.pool, code.radix
        )
        return increment

    def operations(self, inputs: LayerInputs) -> Operations | None:
        (x,) = inputs.tensors
        if not inputs.stepped or inputs.image or self.without_gaps:
            return None  # comparisons of bits
        spikes = float(x.sum(dtype=torch.float64))
        return Operations(spikes, inputs.cells(x), both(spikes))  # each raises one running sum

    def movement(self, inputs: LayerInputs, output: Tensor, operations: Operations | None) -> Movement:
        return pool_movement(inputs, output, self.call, sums=operations is not None)

    def stored_bits(self, weight_bits: Mapping[str, int], merged_bits: int | None) -> float:
        del weight_bits, merged_bits
        return 0.0
