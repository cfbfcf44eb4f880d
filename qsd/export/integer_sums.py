"""Convolutions of integers to float currents, as the operations that ONNX Runtime computes fastest."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd.export.integers import RUNTIME_DOMAIN, IntegerGraph
from qsd.integer.weights import IntegerWeights


def add_currents(
    graph: IntegerGraph,
    label: str,
    weights: IntegerWeights,
    x: str,
    zero_point: int,
    width: int,
    geometry: dict[str, Any],
) -> str:
    """Add a convolution of an integer map.

    Args:
        graph: The graph to add to.
        label: Begin of all names that are added.
        weights: Weights of the convolution, for the units of its input.
        x: Name of the input ``[B, C_in, H, W]``, unsigned bytes.
        zero_point: Input level that stands for 0.
        width: Pixels in a row of the output.
        geometry: Attributes of the convolution, as ONNX's ``Conv`` has them.

    Returns:
        The name of the currents, floats ``[B, H, W, C_out]``.
    """
    zero = graph.shared(zero_point, np.uint8)
    unit = graph.constant(f"{label}.unit", weights.scale.reshape(-1), np.float32)
    bias = graph.constant(f"{label}.bias", weights.bias.reshape(-1), np.float32)
    if geometry["group"] > 1 or not _is_square(geometry):
        whole = graph.weights(f"{label}.weight", weights.integers)
        total = graph.add("ConvInteger", [x, whole, zero], f"{label}.map", **geometry)
        total = graph.add("Transpose", [total], f"{label}.sum", perm=[0, 2, 3, 1])
    else:
        x = graph.add("Transpose", [x], f"{label}.pixels", perm=[0, 2, 3, 1])
        if any(geometry["pads"]):
            top, left, bottom, right = geometry["pads"]
            around = graph.shared([0, top, left, 0, 0, bottom, right, 0], np.int64)
            x = graph.add("Pad", [x, around, zero], f"{label}.padded")
        if geometry["kernel_shape"] == geometry["strides"] == [1, 1]:
            matrix = graph.weights(f"{label}.weight", weights.integers[:, :, 0, 0].T)
            if graph.standard:
                total = graph.add("MatMulInteger", [x, matrix, zero], f"{label}.sum")
                return _add_scale(graph, label, total, unit, bias)
            inputs = [x, matrix, graph.shared(1, np.float32), unit, zero, "", bias]
            return graph.add("MatMulIntegerToFloat", inputs, f"{label}.current", domain=RUNTIME_DOMAIN)
        total = _add_sums(graph, label, weights.integers, x, zero, width, geometry)
    return _add_scale(graph, label, total, unit, bias)


def _add_scale(graph: IntegerGraph, label: str, total: str, unit: str, bias: str) -> str:
    """Currents of integer sums. DequantizeLinear would do the same, on one thread."""
    values = graph.add("Mul", [graph.floats(total, f"{label}.float"), unit], f"{label}.scaled")
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
