"""Products of two trains of spikes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qsd.functional import exact_matmul
from qsd.spiking.clock import Window
from qsd.spiking.layers.base import TimedLayer
from qsd.spiking.layers.costs import LayerInputs, Operations, both
from qsd.spiking.layers.movement import Movement
from qsd.spiking.layers.product_movement import product_movement, query_movement
from qsd.spiking.steps import product_increment, shift


class SpikingProduct(TimedLayer):
    """Product ``left @ right`` of two trains of spikes, ``[..., I, C]`` and ``[..., C, J]``, by temporal decomposition.

    Every step's increment has terms with one binary operand each; their sum over the window is the product of the
    counts, whenever the spikes come. Spikes enter the running sums with their value, and the terms are shifted.
    """

    role = "product"

    def count(self, *inputs: Tensor) -> Tensor:
        left, right = inputs
        return exact_matmul(left, right)

    def step(self, constant: bool, *inputs: Tensor) -> Tensor:
        left, right = (self.runtime.split(x) for x in inputs)
        left_sum, right_sum = torch.zeros_like(left[0]), torch.zeros_like(right[0])
        increments = []
        for step, (x, y) in enumerate(zip(left, right), 1):
            increment, left_sum, right_sum = product_increment(x, y, left_sum, right_sum, self._places(step))
            increments.append(increment)
        return torch.cat(increments)

    def _places(self, step: int) -> tuple[int, int]:
        """Binary places by which both inputs of a step are shifted."""
        left, right = self.codes
        return left.places(step), right.places(step)

    def tick(self, window: Window, *inputs: Tensor) -> Tensor:
        left, right = inputs
        state = window.state
        if window.begins or not state:
            state["left"], state["right"] = torch.zeros_like(left), torch.zeros_like(right)
        increment, state["left"], state["right"] = product_increment(
            left, right, state["left"], state["right"], self._places(window.step)
        )
        return increment

    def operations(self, inputs: LayerInputs) -> Operations:
        left, right = inputs.tensors
        of_left, of_right = (float(inputs.spike_sum(x)) for x in inputs.tensors)
        events = float(inputs.nonzero_sum(left))
        cells_left, cells_right = (inputs.cells(x) for x in inputs.tensors)
        return Operations(
            of_left + of_right,
            cells_left + cells_right,
            additions=both(of_left * right.shape[-1] + of_right * left.shape[-2]),
            dense=_dense(inputs),
            rate=min(of_left / cells_left, of_right / cells_right),
            zero_skipping=None if inputs.brief else self._zero_skipping(inputs),
            nonzero=events,
            effective=events * right.shape[-1],
        )

    def movement(self, inputs: LayerInputs, output: Tensor, operations: Operations | None) -> Movement:
        assert operations is not None
        return product_movement(inputs, operations)

    def _zero_skipping(self, inputs: LayerInputs) -> float:
        """Additions where the running sums that a spike meets are not zero."""
        left, right = (x.double() for x in inputs.tensors)
        if not inputs.stepped and inputs.code.radix == 1:
            # Trains without gaps: a running sum is zero in its neuron's first step only.
            later = right - (right > 0).double()
            return _meet(left, right != 0) + _meet(left != 0, later)
        lefts, rights = inputs.steps(left), inputs.steps(right)
        before, after = lefts.cumsum(0) - lefts, rights.cumsum(0)
        return sum(_meet(x, s != 0) + _meet(p != 0, y) for x, s, p, y in zip(lefts, after, before, rights))

    def stored_bits(self, weight_bits: Mapping[str, int], merged_bits: int | None) -> float:
        del weight_bits, merged_bits
        return 0.0


class SpikingQuery(SpikingProduct):
    """Binary query spikes ``[..., C, N]`` that add columns of an integer matrix ``M``, ``[..., I, C]``.

    The matrix comes as increments. The query waits until it is complete, all steps of a window but one (T - 1 in the
    unary code): taken increment by increment the product would multiply integers by integers, which is not
    spike-driven.
    """

    def window_offset(self) -> int:
        return self.runtime.code.steps - 1

    def busy_steps(self) -> int:
        return self.runtime.code.steps + self.window_offset()

    def step(self, constant: bool, *inputs: Tensor) -> Tensor:
        increments, query = (self.runtime.split(x) for x in inputs)
        return self.codes[1].weigh((increments.sum(0) @ query).flatten(0, 1))

    def tick(self, window: Window, *inputs: Tensor) -> Tensor:
        increment, query = inputs
        state = window.state
        if window.begins or not state:
            state["matrix"] = torch.zeros_like(increment)
        state["matrix"] = state["matrix"] + increment
        waited = self.runtime.run.clock.hold(query, self.window_offset())
        return shift(state["matrix"] @ waited, self.codes[1].places(window.step - self.window_offset()))

    def operations(self, inputs: LayerInputs) -> Operations:
        matrix, query = inputs.tensors
        spikes, cells = float(inputs.spike_sum(query)), inputs.cells(query)
        skipping = None
        if not inputs.brief:
            skipping = _meet(inputs.counts(matrix) != 0, inputs.counts(inputs.spikes(query)))
        additions = both(spikes * matrix.shape[-2])
        events = float(inputs.nonzero_sum(query))
        return Operations(
            spikes,
            cells,
            additions,
            dense=_dense(inputs),
            zero_skipping=skipping,
            nonzero=events,
            effective=events * matrix.shape[-2],
        )

    def movement(self, inputs: LayerInputs, output: Tensor, operations: Operations | None) -> Movement:
        assert operations is not None
        return query_movement(inputs, operations)


def _dense(inputs: LayerInputs) -> float:
    left, right = inputs.tensors
    return inputs.images * (left[0].numel() * right.shape[-1])


def _meet(left: Tensor, right: Tensor) -> float:
    """``(left @ right).sum()`` without the product."""
    return float((left.double().sum(-2) * right.double().sum(-1)).sum())
