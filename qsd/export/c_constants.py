"""The constants of a generated C program: weights, tables, thresholds and geometries."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd.integer import Description
from qsd.integer.description import AnyLayer
from qsd.integer.scaling import Table

Arrays = Mapping[str, NDArray[Any]]
_LINE = 110
_PACKABLE_BITS = 4
_AXES = 3


def constants(layer: AnyLayer, number: int, network: Description, arrays: Arrays) -> list[str]:
    """The C definitions of a layer's constants.

    Args:
        layer: The layer.
        number: Its number, which names the constants.
        network: The network.
        arrays: Its arrays.
    """
    write = _CONSTANTS.get(layer.kind)
    return [] if write is None else write(layer, number, network, arrays)


def _array(kind: str, name: str, values: NDArray[Any]) -> str:
    """A definition of an array, in lines of moderate length."""
    lines, line = [], ""
    for value in values.reshape(-1).tolist():
        text = f"{value}," if value > -(2**31) else "INT32_MIN,"
        if len(line) + len(text) > _LINE:
            lines.append(line)
            line = ""
        line += text
    return "\n    ".join([f"static const {kind} {name}[{values.size}] = {{", *lines, line]) + "\n};"


def _of(layer: AnyLayer, name: str, arrays: Arrays) -> NDArray[Any]:
    return arrays[f"{layer.name}/{name}"].astype(np.int64)


def _input(layer: AnyLayer, network: Description) -> AnyLayer:
    return next(before for before in network.layers if before.name == layer.inputs[0])


def _pixels(layer: Any, number: int, _network: Description, arrays: Arrays) -> list[str]:
    return [_array("int32_t", f"table{number}", _of(layer, "table", arrays))]


def _geometry(layer: Any, network: Description) -> list[int]:
    """The numbers of ``qsd_convolution`` up to the groups; a kernel of one pixel takes a map for one long row."""
    before = _input(layer, network)
    (channels, *size), (outputs, *out) = before.shape, layer.shape
    if layer.kernel == layer.stride == [1, 1] and not any(layer.padding):
        size, out = [1, prod(size)], [1, prod(out)]
    places = [*layer.kernel, *layer.stride, layer.padding[0], layer.padding[2], *layer.dilation]
    return [channels, *size, outputs, *out, *places, getattr(layer, "groups", 1)]


def _convolution(layer: Any, number: int, network: Description, arrays: Arrays) -> list[str]:
    weight, packed = _of(layer, "weight", arrays).reshape(-1), layer.weight_bits <= _PACKABLE_BITS
    if packed:
        halves = np.append(weight & 15, np.zeros(len(weight) % 2, np.int64)).reshape(-1, 2)
        stored = halves[:, 0] | halves[:, 1] << 4
    else:
        stored = weight & 255
    lines, codes, table = [_array("uint8_t", f"weight{number}", stored)], 0, "NULL"
    if layer.table_shift is not None:
        codes, table = 2**layer.weight_bits, f"table{number}"
        numbers = np.arange(codes)
        signed = np.where(numbers < codes // 2, numbers, numbers - codes)
        multiplier = _of(layer, "multiplier", arrays)
        entries = Table(multiplier, layer.table_shift).entries(signed[None].repeat(len(multiplier), 0))
        lines.append(_array("int32_t", table, entries))
    numbers_of = ", ".join(map(str, [*_geometry(layer, network), int(packed), codes]))
    lines.append(f"static const qsd_convolution layer{number} = {{{numbers_of}, weight{number}, {table}}};")
    return lines


def _max_pool(layer: Any, number: int, network: Description, _arrays: Arrays) -> list[str]:
    numbers = ", ".join(map(str, [*_geometry(layer, network), 0, 0]))
    return [f"static const qsd_convolution layer{number} = {{{numbers}, NULL, NULL}};"]


def _rescale(layer: Any, number: int, _network: Description, arrays: Arrays) -> list[str]:
    return [_array("int32_t", f"multiplier{number}", _of(layer, "multiplier", arrays))]


def _total(layer: Any, number: int, _network: Description, arrays: Arrays) -> list[str]:
    return [_array("int32_t", f"bias{number}", _of(layer, "bias", arrays))] if layer.biased else []


def _neuron(layer: Any, number: int, network: Description, arrays: Arrays) -> list[str]:
    thresholds, direction = _of(layer, "thresholds", arrays), "NULL"
    lines = [_array("int32_t", f"thresholds{number}", thresholds)]
    if layer.directed:
        direction = f"direction{number}"
        lines.append(_array("int8_t", direction, _of(layer, "direction", arrays)))
    shared = int(len(thresholds) == 1)
    sizes = f"{layer.shape[0]}, {prod(layer.shape[1:])}, {shared}, {network.time_steps}"
    lines.append(f"static const qsd_neuron layer{number} = {{{sizes}, thresholds{number}, {direction}}};")
    return lines


def _permute(layer: Any, number: int, network: Description, _arrays: Arrays) -> list[str]:
    before = _input(layer, network)
    strides = [prod(before.shape[axis + 1 :]) for axis in layer.axes]
    missing = [1] * (_AXES - len(layer.shape))
    numbers = {"size": [*missing, *layer.shape], "stride": [*missing, *strides]}
    return [_array("int", f"{name}{number}", np.array(values)) for name, values in numbers.items()]


_CONSTANTS: dict[str, Callable[[Any, int, Description, Arrays], list[str]]] = {
    "pixels": _pixels,
    "convolution": _convolution,
    "max_pool": _max_pool,
    "rescale": _rescale,
    "total": _total,
    "neuron": _neuron,
    "permute": _permute,
}
