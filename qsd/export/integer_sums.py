"""Convolutions of integers to float currents, as the operations that ONNX Runtime computes fastest."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd.export.grids import Grid
from qsd.export.integers import RUNTIME_DOMAIN, IntegerGraph
from qsd.integer.weights import IntegerWeights

_EXACT = 2**24  # Floats of 32 bits hold all integers below it.


@dataclass(frozen=True)
class Source:
    """The input of a convolution: unsigned bytes ``[B, C_in, H, W]``.

    Attributes:
        name: Name of the value.
        zero_point: Level that stands for 0.
        largest: Largest distance of a level from it.
    """

    name: str
    zero_point: int
    largest: int

    @classmethod
    def of(cls, name: str, grid: Grid | None, graph: IntegerGraph) -> "Source":
        """An inner activation, or spike counts.

        Args:
            name: Name of the value.
            grid: Grid of the activation, ``None`` for counts.
            graph: The graph.
        """
        return cls(name, 0, graph.spiking.time_steps) if grid is None else cls(name, grid.zero_point, 255)


def add_currents(
    graph: IntegerGraph, label: str, weights: IntegerWeights, source: Source, width: int, geometry: dict[str, Any]
) -> str:
    """Add a convolution of an integer map.

    Args:
        graph: The graph to add to.
        label: Begin of all names that are added.
        weights: Weights of the convolution, for the units of its input.
        source: Its input.
        width: Pixels in a row of the output.
        geometry: Attributes of the convolution, as ONNX's ``Conv`` has them.

    Returns:
        The name of the currents, floats ``[B, H, W, C_out]``.
    """
    unit = graph.constant(f"{label}.unit", weights.scale.reshape(-1), np.float32)
    bias = graph.constant(f"{label}.bias", weights.bias.reshape(-1), np.float32)
    pixelwise = geometry["kernel_shape"] == geometry["strides"] == [1, 1]
    if geometry["group"] > 1 or not _is_square(geometry) or (graph.standard and not pixelwise):
        total = add_map(graph, label, weights.integers, source, geometry)
        total = graph.add("Transpose", [total], f"{label}.sum", perm=[0, 2, 3, 1])
        return _add_scale(graph, label, total, unit, bias)
    zero = graph.shared(source.zero_point, np.uint8)
    x = graph.add("Transpose", [source.name], f"{label}.pixels", perm=[0, 2, 3, 1])
    if any(geometry["pads"]):
        top, left, bottom, right = geometry["pads"]
        around = graph.shared([0, top, left, 0, 0, bottom, right, 0], np.int64)
        x = graph.add("Pad", [x, around, zero], f"{label}.padded")
    if pixelwise:
        matrix = graph.weights(f"{label}.weight", weights.integers[:, :, 0, 0].T)
        if not graph.standard:
            inputs = [x, matrix, graph.shared(1, np.float32), unit, zero, "", bias]
            return graph.add("MatMulIntegerToFloat", inputs, f"{label}.current", domain=RUNTIME_DOMAIN)
        total = graph.add("MatMulInteger", [x, matrix, zero], f"{label}.sum")
    else:
        total = _add_sums(graph, label, weights.integers, x, zero, width, geometry)
    return _add_scale(graph, label, graph.floats(total, f"{label}.float"), unit, bias)


def add_map(
    graph: IntegerGraph,
    label: str,
    weight: NDArray[Any],
    source: Source,
    geometry: dict[str, Any],
    bias: NDArray[Any] | None = None,
) -> str:
    """Add a convolution of integers by operations of the ONNX standard.

    Floats hold sums below 2**24 exactly, and `Conv` of floats is several times as fast as `ConvInteger`, which is left
    for larger sums. A `Round`, which changes nothing, keeps runtimes from moving factors behind the convolution into
    its weights, which would round them.

    Args:
        graph: The graph to add to.
        label: Begin of all names that are added.
        weight: Integers ``[C_out, C_in / groups, k_h, k_w]``.
        source: Its input.
        geometry: Attributes of the convolution, as ONNX's ``Conv`` has them.
        bias: Integers ``[C_out]``, or ``None`` for none.

    Returns:
        The name of the sums, whole floats ``[B, C_out, H, W]``.
    """
    whole, added = graph.weights(f"{label}.weight", weight), np.zeros(len(weight)) if bias is None else bias
    reach = source.largest * np.abs(weight.astype(np.float64)).sum((1, 2, 3)) + np.abs(added.astype(np.float64))
    if reach.max(initial=0) < _EXACT:
        levels = graph.floats(source.name, f"{label}.input")
        if source.zero_point:
            levels = graph.add("Sub", [levels, graph.shared(source.zero_point, np.float32)], f"{label}.centred")
        inputs = [levels, graph.floats(whole, f"{label}.floats")]
        if added.any():
            inputs.append(graph.constant(f"{label}.offset", added, np.float32))
        return graph.add("Round", [graph.add("Conv", inputs, f"{label}.map", **geometry)], f"{label}.exact")
    zero = graph.shared(source.zero_point, np.uint8)
    total = graph.add("ConvInteger", [source.name, whole, zero], f"{label}.map", **geometry)
    if added.any():
        offset = graph.constant(f"{label}.offset", added.reshape(-1, 1, 1), np.int32)
        total = graph.add("Add", [total, offset], f"{label}.raised")
    return graph.floats(total, f"{label}.exact")


def _add_scale(graph: IntegerGraph, label: str, total: str, unit: str, bias: str) -> str:
    """Currents of whole floats. DequantizeLinear would do the same, on one thread."""
    values = graph.add("Mul", [total, unit], f"{label}.scaled")
    return graph.add("Add", [values, bias], f"{label}.current")


def _is_square(geometry: dict[str, Any]) -> bool:
    return len({*geometry["kernel_shape"]}) == len({*geometry["strides"]}) == 1 and "dilations" not in geometry


def _add_sums(
    graph: IntegerGraph, label: str, weight: NDArray[Any], x: str, zero: str, width: int, geometry: dict[str, Any]
) -> str:
    """A convolution's accumulators, int32, as products of matrices: twenty times as fast as ConvInteger.

    The pixels under one row of the kernel are laid side by side. One product then gives the contributions of all rows
    of the kernel, and these are added, each from a row of the map further on.
    """
    side, stride, outputs = geometry["kernel_shape"][0], geometry["strides"][0], len(weight)
    seen = graph.constant(f"{label}.seen", stride * np.arange(width)[:, None] + np.arange(side), np.int32)
    x = graph.add("Gather", [x, seen], f"{label}.columns", axis=2)
    x = graph.add("Reshape", [x, graph.shared([0, 0, 0, -1], np.int64)], f"{label}.rows")
    if stride == 1:
        matrix = weight.transpose(3, 1, 2, 0).reshape(-1, side * outputs)
        whole = graph.weights(f"{label}.weight", matrix)
        product = graph.add("MatMulInteger", [x, whole, zero], f"{label}.product")
        parts = [_add_rows(graph, f"{label}.part{i}", product, i, side, 1, outputs) for i in range(side)]
    else:  # Rows that the stride skips need no product.
        parts = []
        for i in range(side):
            matrix = weight[:, :, i].transpose(2, 1, 0).reshape(-1, outputs)
            whole = graph.weights(f"{label}.weight{i}", matrix)
            rows = _add_rows(graph, f"{label}.rows{i}", x, i, side, stride)
            parts.append(graph.add("MatMulInteger", [rows, whole, zero], f"{label}.part{i}"))
    total = parts[0]
    for i, part in enumerate(parts[1:], 1):
        total = graph.add("Add", [total, part], f"{label}.sum{i}")
    return total


def _add_rows(
    graph: IntegerGraph, label: str, x: str, row: int, side: int, stride: int, channels: int | None = None
) -> str:
    """The rows of a map under one row of the kernel; with ``channels``, the ``row``-th group of that many channels."""
    bounds = {"start": [row], "end": [row + 1 - side or np.iinfo(np.int64).max], "axis": [1], "step": [stride]}
    if channels is not None:
        for key, value in zip(bounds, (row * channels, (row + 1) * channels, 3, 1)):
            bounds[key].append(value)
    places = [graph.shared(values, np.int64) for values in bounds.values()]
    return graph.add("Slice", [x, *places], label)
