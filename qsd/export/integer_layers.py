"""The writers of the engine's layers for integer ONNX files."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from qsd.export.chain_factors import ChainFactor, chain_factors
from qsd.export.graph import LayerCall
from qsd.export.grids import Grid
from qsd.export.integer_sums import Source, add_currents, add_map
from qsd.export.integers import IntegerGraph, writes
from qsd.export.requantization import Requantization
from qsd.integer.weights import IntegerWeights, evaluated_convolutions
from qsd.spiking.layers import (
    DelayedNeuron,
    HalfEvenNeuron,
    SpikingChain,
    SpikingDense,
    SpikingEvents,
    SpikingMaxPool,
    SpikingPooledDense,
    SpikingProduct,
    SpikingQuery,
)

# QuantizeLinear rounds halves to the even number, but a neuron rounds them up. A threshold that is smaller by this many
# floats lifts the quotient of an exact tie above one half.
_ULPS = 4

# Products of counts are sums of integers, which floats hold exactly: PyTorch's matrix product is right as it is.
writes.leave_to_torch(SpikingProduct, SpikingQuery)


@writes(DelayedNeuron)
def _neuron(neuron: DelayedNeuron, call: LayerCall, graph: IntegerGraph) -> None:
    threshold = np.float32(call.threshold)
    for _ in range(_ULPS):
        threshold = np.nextafter(threshold, np.float32(0))
    _add_neuron(neuron, threshold, call, graph)


@writes(HalfEvenNeuron)
def _half_even_neuron(neuron: HalfEvenNeuron, call: LayerCall, graph: IntegerGraph) -> None:
    _add_neuron(neuron, np.float32(call.threshold), call, graph)


@writes(SpikingEvents)
def _events(events: SpikingEvents, call: LayerCall, graph: IntegerGraph) -> None:
    # Counts of events are whole numbers, so that it does not matter how halves are rounded.
    inputs = [call.inputs[0], graph.shared(1.0, np.float32), graph.shared(0, np.uint8)]
    _add_clip(events, graph.add("QuantizeLinear", inputs, f"{events.name}.drive"), call.output, graph)


def _add_neuron(neuron: DelayedNeuron, threshold: np.float32, call: LayerCall, graph: IntegerGraph) -> None:
    name = neuron.name
    if graph.standard:
        _add_clip(neuron, _rounded(neuron, threshold, call.inputs[0], graph), call.output, graph)
        return
    inputs = [
        call.inputs[0],
        graph.constant(f"{name}.threshold", threshold, np.float32),
        graph.shared(0, np.uint8),
    ]
    _add_clip(neuron, graph.add("QuantizeLinear", inputs, f"{name}.drive"), call.output, graph)


def _rounded(neuron: DelayedNeuron, threshold: np.float32, x: str, graph: IntegerGraph) -> str:
    """Currents over the threshold, rounded to bytes, by operations that all runtimes compute alike.

    OpenVINO decides ties of QuantizeLinear otherwise.
    """
    name = neuron.name
    value = graph.add("Div", [x, graph.constant(f"{name}.threshold", threshold, np.float32)], f"{name}.quotient")
    if type(neuron) is HalfEvenNeuron:
        value = graph.add("Round", [value], f"{name}.rounded")
    else:
        half = graph.shared(0.5, np.float32)
        value = graph.add("Floor", [graph.add("Add", [value, half], f"{name}.raised")], f"{name}.rounded")
    return _add_bytes(value, name, f"{name}.drive", graph)


def _add_bytes(value: str, label: str, output: str, graph: IntegerGraph) -> str:
    """Whole floats as unsigned bytes, cut off at both ends."""
    value = graph.add("Clip", [value, *(graph.shared(end, np.float32) for end in (0, 255))], f"{label}.byte")
    return graph.add("Cast", [value], output, to=graph.onnx.TensorProto.UINT8)


def _add_clip(neuron: DelayedNeuron | SpikingEvents, drive: str, output: str, graph: IntegerGraph) -> None:
    """At most T spikes; unsigned bytes are not negative anyway."""
    graph.add("Clip", [drive, "", graph.constant(f"{neuron.name}.time_steps", neuron.time_steps, np.uint8)], output)


@writes(SpikingChain)
def _chain(chain: SpikingChain, call: LayerCall, graph: IntegerGraph) -> None:
    counts, after = graph.holds_counts(call.inputs[0]), graph.only_user(call.output)
    if not counts:  # An image.
        _add_float_chain(chain, call.inputs[0], call.output, graph)
    elif not _has_grids(chain, graph):
        spikes = graph.floats(call.inputs[0], f"{chain.name}.spikes")
        _add_float_chain(chain, spikes, call.output, graph)
    elif after is not None and type(after.layer) is DelayedNeuron and _add_counting_chain(chain, call, after, graph):
        graph.finish(after)
    else:
        _add_current_chain(chain, call, graph)


def _has_grids(chain: SpikingChain, graph: IntegerGraph) -> bool:
    """Whether all inner activations of a chain have grids, which is so for a single convolution."""
    return all(f"{chain.name}.{key}" in graph.grids for key in [*evaluated_convolutions(chain)][:-1])


def _add_float_chain(chain: SpikingChain, x: str, output: str, graph: IntegerGraph) -> None:
    """A chain in floats, from weights of 8 bits."""
    factors = chain_factors(chain, graph.spiking)
    for key, factor in factors.items():
        weights, label = factor.weights, f"{chain.name}.{key}"
        whole = graph.weights(f"{label}.weight", weights.integers)
        unit = graph.constant(f"{label}.unit", weights.scale, np.float32)
        floats = graph.add("DequantizeLinear", [whole, unit], f"{label}.floats", axis=0)
        bias = graph.constant(f"{label}.bias", weights.bias, np.float32)
        name = output if key == [*factors][-1] else f"{label}.output"
        x = graph.add("Conv", [x, floats, bias], name, **factor.geometry)


def _add_counting_chain(chain: SpikingChain, call: LayerCall, after: LayerCall, graph: IntegerGraph) -> bool:
    """A chain and the neuron after it, from counts to counts; ``False`` if no bias and multiplier give the counts."""
    *inner, (key, last) = chain_factors(chain, graph.spiking).items()
    grid = None
    if inner:
        source, grid = _add_inner(chain, dict(inner), call.inputs[0], graph)
        fitted = Requantization.rounded(last.weights.taking(grid.unit, grid.depthwise), 255, after.threshold)
    else:
        counting = Requantization.counting(last.weights, after.threshold, graph.spiking.time_steps)
        if counting is None:
            return False
        source, fitted = call.inputs[0], counting
    place = _Place(f"{chain.name}.{key}", last.geometry, f"{after.layer.name}.drive")
    _add_clip(after.layer, _add_convolution(place, fitted, source, (grid, None), graph), after.output, graph)
    return True


def _add_current_chain(chain: SpikingChain, call: LayerCall, graph: IntegerGraph) -> None:
    """A chain from counts to currents: integer convolutions, and floats from the last accumulator on."""
    *inner, (key, last) = chain_factors(chain, graph.spiking).items()
    weights, name, grid = last.weights, call.inputs[0], None
    if inner:
        name, grid = _add_inner(chain, dict(inner), name, graph)
        weights = weights.taking(grid.unit, grid.depthwise)
    source, width = Source.of(name, grid, graph), graph.width(call.output)
    currents = add_currents(graph, f"{chain.name}.{key}", weights, source, width, last.geometry)
    graph.add("Transpose", [currents], call.output, perm=[0, 3, 1, 2])


def _add_inner(chain: SpikingChain, factors: dict[str, ChainFactor], x: str, graph: IntegerGraph) -> tuple[str, Grid]:
    """All convolutions of a chain but the last, from counts to an inner activation of 8 bits, and its grid."""
    before: Grid | None = None
    for key, factor in factors.items():
        label = f"{chain.name}.{key}"
        weights, grid = factor.weights, graph.grids[label]
        if before is not None:
            weights = weights.taking(before.unit, before.depthwise)
        rounded = Requantization.rounded(weights, 255 if before else graph.spiking.time_steps, grid.unit)
        x = _add_convolution(_Place(label, factor.geometry, f"{label}.output"), rounded, x, (before, grid), graph)
        before = grid
    assert before is not None
    return x, before


@dataclass(frozen=True)
class _Place:
    """A convolution of the graph: begin of the names that it adds, its attributes, and the name of its output."""

    label: str
    geometry: dict[str, Any]
    output: str


def _add_convolution(
    place: _Place, numbers: Requantization, x: str, grids: tuple[Grid | None, Grid | None], graph: IntegerGraph
) -> str:
    """An integer convolution; the grids are those of its input and output, ``None`` for counts."""
    label, (zero_in, zero_out) = place.label, (grid.zero_point if grid else 0 for grid in grids)
    if graph.standard:
        return _add_plain_convolution(place, numbers, Source.of(x, grids[0], graph), zero_out, graph)
    # ONNX multiplies by input scale times weight scale over output scale; the multiplier is that product.
    one = graph.shared(1, np.float32)
    inputs = [
        x,
        one,
        graph.shared(zero_in, np.uint8),
        graph.weights(f"{label}.weight", numbers.weight),
        graph.constant(f"{label}.multiplier", numbers.multiplier, np.float32),
        graph.shared(0, np.int8),
        one,
        graph.shared(zero_out, np.uint8),
    ]
    if numbers.bias.any():
        inputs.append(graph.constant(f"{label}.bias", numbers.bias, np.int32))
    return graph.add("QLinearConv", inputs, place.output, **place.geometry)


def _add_plain_convolution(
    place: _Place, numbers: Requantization, source: Source, zero_out: int, graph: IntegerGraph
) -> str:
    """The same as QLinearConv in several operations: OpenVINO takes its scales for those of input channels."""
    label = place.label
    total = add_map(graph, label, numbers.weight, source, place.geometry, numbers.bias)
    multiplier = graph.constant(f"{label}.multiplier", numbers.multiplier.reshape(-1, 1, 1), np.float32)
    values = graph.add("Mul", [total, multiplier], f"{label}.scaled")
    level = graph.shared(zero_out, np.float32)
    levels = graph.add("Add", [graph.add("Round", [values], f"{label}.rounded"), level], f"{label}.levels")
    return _add_bytes(levels, label, place.output, graph)


@writes(SpikingDense)
def _dense(layer: SpikingDense, call: LayerCall, graph: IntegerGraph) -> None:
    _add_dense(layer, call.inputs[0], graph.holds_counts(call.inputs[0]), call.output, graph)


@writes(SpikingPooledDense)
def _pooled_dense(layer: SpikingPooledDense, call: LayerCall, graph: IntegerGraph) -> None:
    x, name = call.inputs[0], layer.name
    if graph.holds_counts(x):
        x = graph.floats(x, f"{name}.counts")
    axes = graph.shared([2, 3], np.int64)
    mean = graph.add("ReduceMean", [x, axes], f"{name}.mean", noop_with_empty_axes=0, keepdims=0)
    _add_dense(layer, mean, False, call.output, graph)


def _add_dense(layer: SpikingDense, x: str, counts: bool, output: str, graph: IntegerGraph) -> None:
    """A fully connected layer on counts or on floats, from weights of 8 bits."""
    name, weights = layer.name, IntegerWeights.of(layer, f"{layer.name}.weight", layer.name, graph.spiking)
    whole = graph.weights(f"{name}.weight", weights.integers.T)
    unit = graph.constant(f"{name}.unit", weights.scale, np.float32)
    if counts:
        total = graph.floats(graph.add("MatMulInteger", [x, whole], f"{name}.sum"), f"{name}.float")
    else:
        # DequantizeLinear would do the same, but ONNX Runtime makes one operation of it and the product, and rounds
        # the other operand.
        total = graph.add("MatMul", [x, graph.floats(whole, f"{name}.floats")], f"{name}.sum")
    values = graph.add("Mul", [total, unit], f"{name}.scaled")
    graph.add("Add", [values, graph.constant(f"{name}.bias", weights.bias, np.float32)], output)


@writes(SpikingMaxPool)
def _max_pool(layer: SpikingMaxPool, call: LayerCall, graph: IntegerGraph) -> None:
    kernel, stride, padding, dilation = (
        [value, value] if isinstance(value, int) else list(value)
        for value in (layer.pool.kernel_size, layer.pool.stride, layer.pool.padding, layer.pool.dilation)
    )
    graph.add(
        "MaxPool",
        [call.inputs[0]],
        call.output,
        kernel_shape=kernel,
        strides=stride,
        pads=[*padding, *padding],
        dilations=dilation,
        ceil_mode=int(layer.pool.ceil_mode),
    )
