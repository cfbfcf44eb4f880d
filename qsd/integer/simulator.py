"""The reference simulator: an integer network in counts and in steps, on NumPy's integers alone, slow and plain.

It shares nothing with the engine of `qsd.spiking`. Every value is checked against the range that the description
states, so that no width can be too small without notice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd.errors import QsdError
from qsd.integer import description as d
from qsd.integer.scaling import Table, half

Array = NDArray[Any]
Arrays = Mapping[str, Array]
# A product of two arrays of integers as `numpy.matmul` computes it.
Matmul = Callable[[Array, Array], Array]


@dataclass
class Values:
    """The signals of one run.

    Attributes:
        signals: By name of the layer, ``[B, ...]`` in counts and ``[T, B, ...]`` in steps.
        multiplications: By layer the widths of both operands of the multiplications of data that were done, where both
            have more than one bit.
    """

    signals: dict[str, Array] = field(default_factory=dict)
    multiplications: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """What all layers of a run need.

    Attributes:
        arrays: Arrays of the layers.
        steps: T.
        matmul: Product of two arrays of integers.
    """

    arrays: Arrays
    steps: int
    matmul: Matmul = np.matmul

    def array(self, layer: d.Layer, name: str) -> Array:
        """An array of a layer, int64."""
        return self.arrays[f"{layer.name}/{name}"].astype(np.int64)


def run_counts(network: d.Description, arrays: Arrays, pixels: Array, matmul: Matmul = np.matmul) -> Values:
    """All signals of images as sums over the window: spikes as counts.

    Args:
        network: The description.
        arrays: Its arrays.
        pixels: uint8 ``[B, C, H, W]``.
        matmul: Product of two arrays of integers; another one must be exact for all ranges of the description.
    """
    values, run = Values(), _Run(arrays, network.time_steps, matmul)
    for layer in network.layers:
        inputs = [values.signals[name] for name in layer.inputs] or [pixels]
        values.signals[layer.name] = _checked(layer, _COUNTS[layer.kind](layer, run, *inputs))
    return values


def run_steps(network: d.Description, arrays: Arrays, pixels: Array) -> Values:
    """All signals of images step by step: spikes as 0 and 1, currents as what arrives in each step.

    Layers run one after the other over their window of T steps. The image gives its whole current in the first step.

    Args:
        network: The description.
        arrays: Its arrays.
        pixels: uint8 ``[B, C, H, W]``.
    """
    values, run = Values(), _Run(arrays, network.time_steps)
    for layer in network.layers:
        inputs = [values.signals[name] for name in layer.inputs] or [pixels]
        output = _STEPS[layer.kind](layer, run, *inputs)
        for seen in np.cumsum(output, 0):
            _checked(layer, seen)
        values.signals[layer.name] = output
        operands = _operands(layer, arrays, inputs)
        if operands is not None:
            values.multiplications[layer.name] = operands
    return values


def _checked(layer: d.Layer, output: Array) -> Array:
    """The output, whose shape and range must be those of the description."""
    if output.shape[1:] != tuple(layer.shape):
        raise QsdError(
            f"layer {layer.name} gives the shape {list(output.shape[1:])} instead of {layer.shape}; give images of "
            "the size that the network was made for."
        )
    if output.size and (output.min() < layer.low or output.max() > layer.high):
        raise QsdError(f"layer {layer.name} leaves its range from {layer.low} to {layer.high}.")
    return output


def _operands(layer: d.AnyLayer, arrays: Arrays, inputs: list[Array]) -> tuple[int, int] | None:
    """Widths of the operands of a multiplication of data in steps, ``None`` if an operand of each product is a bit."""
    if layer.kind == "rescale":
        return d.width(*_ends(inputs[0].sum(0))), d.width(*_ends(arrays[f"{layer.name}/multiplier"]))
    if layer.kind == "convolution" and not _binary(inputs[0]):
        return d.width(*_ends(inputs[0])), layer.entry_bits
    if layer.kind == "product" and not (_binary(inputs[0]) and _binary(inputs[1])):
        return d.width(*_ends(inputs[0])), d.width(*_ends(inputs[1]))
    if layer.kind == "query" and not _binary(inputs[1]):
        return d.width(*_ends(inputs[0])), d.width(*_ends(inputs[1]))
    return None


def _ends(values: Array) -> tuple[int, int]:
    return int(values.min(initial=0)), int(values.max(initial=0))


def _binary(values: Array) -> bool:
    return bool(((values == 0) | (values == 1)).all())


# -- layers in counts ------------------------------------------------------------------------------------------------


def _pixels(layer: d.Pixels, run: _Run, pixels: Array) -> Array:
    table = run.array(layer, "table")
    return np.stack([table[channel][pixels[:, channel]] for channel in range(len(table))], 1)


def _weights(layer: d.Convolution, run: _Run) -> Array:
    """The weights, or their entries in the table."""
    weight = run.array(layer, "weight")
    if layer.table_shift is None:
        return weight
    return Table(run.array(layer, "multiplier"), layer.table_shift).entries(weight)


def _windows(x: Array, layer: d.Convolution | d.MaxPool, fill: int) -> Array:
    """What each tap of a kernel sees, ``[k_h, k_w, B, C, H', W']``."""
    top, bottom, left, right = layer.padding
    x = np.pad(x, [(0, 0), (0, 0), (top, bottom), (left, right)], constant_values=fill)
    (height, width), (down, across) = layer.shape[1:], layer.stride
    taps = []
    for i in range(layer.kernel[0]):
        for j in range(layer.kernel[1]):
            row, column = i * layer.dilation[0], j * layer.dilation[1]
            taps.append(x[:, :, row : row + down * height : down, column : column + across * width : across])
    return np.stack(taps).reshape(*layer.kernel, *taps[0].shape)


def _convolution(layer: d.Convolution, run: _Run, x: Array) -> Array:
    weight, groups = _weights(layer, run), layer.groups
    output = np.zeros((len(x), *layer.shape), np.int64)
    by_group = output.reshape(len(x), groups, layer.shape[0] // groups, -1)
    windows = _windows(x, layer, 0)
    for i in range(layer.kernel[0]):
        for j in range(layer.kernel[1]):
            seen = windows[i, j].reshape(len(x), groups, x.shape[1] // groups, -1)
            factor = weight[:, :, i, j].reshape(groups, layer.shape[0] // groups, -1)
            by_group += factor * seen if factor.shape[1:] == (1, 1) else run.matmul(factor, seen)
    return output


def _rescale(layer: d.Rescale, run: _Run, x: Array) -> Array:
    multiplier = run.array(layer, "multiplier").reshape(-1, *[1] * (x.ndim - 2))
    return (x * multiplier + half(layer.shift)) >> layer.shift


def _bias(layer: d.Total, run: _Run) -> Array:
    return run.array(layer, "bias").reshape(-1, 1, 1) if layer.biased else np.zeros((1, 1, 1), np.int64)


def _neuron(layer: d.Neuron, run: _Run, x: Array) -> Array:
    membrane, thresholds = _directed(layer, run, x), _thresholds(layer, run, x)
    return np.stack([membrane >= threshold for threshold in thresholds]).sum(0, dtype=np.int64)


def _directed(layer: d.Neuron, run: _Run, x: Array) -> Array:
    """The membrane, negated in the channels where it has to be."""
    if not layer.directed:
        return x
    return x * run.array(layer, "direction").reshape(-1, *[1] * (x.ndim - 2))


def _thresholds(layer: d.Neuron, run: _Run, x: Array) -> list[Array]:
    """The thresholds of the spikes 1, 2, ..., T, for membranes ``[B, C, ...]``."""
    thresholds = run.array(layer, "thresholds")
    return [column.reshape(-1, *[1] * (x.ndim - 2)) for column in thresholds.T]


_COUNTS: dict[str, Callable[..., Array]] = {
    "pixels": _pixels,
    "events": lambda _layer, _run, counts: counts.astype(np.int64),
    "convolution": _convolution,
    "rescale": _rescale,
    "add": lambda _layer, _run, x, y: x + y,
    "total": lambda layer, run, x: x.sum((2, 3), keepdims=True) + _bias(layer, run),
    "neuron": _neuron,
    "max_pool": lambda layer, _run, x: _windows(x, layer, 0).max((0, 1)),
    "product": lambda _layer, run, x, y: run.matmul(x, y),
    "query": lambda _layer, run, x, y: run.matmul(x, y),
    "reshape": lambda layer, _run, x: x.reshape(len(x), *layer.shape),
    "permute": lambda layer, _run, x: x.transpose(0, *[axis + 1 for axis in layer.axes]),
}


# -- layers in steps -------------------------------------------------------------------------------------------------


def _each_step(kind: str) -> Callable[..., Array]:
    """A layer that acts on every step alone."""

    def step(layer: Any, run: _Run, *inputs: Array) -> Array:
        return np.stack([_COUNTS[kind](layer, run, *(x[t] for x in inputs)) for t in range(run.steps)])

    return step


def _pixels_in_steps(layer: d.Pixels, run: _Run, pixels: Array) -> Array:
    first = _pixels(layer, run, pixels)
    return np.stack([first, *[np.zeros_like(first)] * (run.steps - 1)])


def _total_in_steps(layer: d.Total, run: _Run, x: Array) -> Array:
    sums = x.sum((3, 4), keepdims=True)
    sums[0] += _bias(layer, run)
    return sums


def _rescale_in_steps(layer: d.Rescale, run: _Run, x: Array) -> Array:
    complete = x[0]
    for t in range(1, run.steps):
        complete = complete + x[t]
    last = _rescale(layer, run, complete)
    return np.stack([*[np.zeros_like(last)] * (run.steps - 1), last])


def _neuron_in_steps(layer: d.Neuron, run: _Run, x: Array) -> Array:
    """Charges in the steps 1 to T and fires in the steps T to 2 T - 1."""
    membrane, thresholds, spikes = np.zeros_like(x[0]), _thresholds(layer, run, x[0]), []
    for step in range(2 * run.steps - 1):
        if step < run.steps:
            membrane = membrane + x[step]
        if step >= run.steps - 1:
            spikes.append((_directed(layer, run, membrane) >= thresholds[step - run.steps + 1]).astype(np.int64))
    return np.stack(spikes)


def _product_in_steps(_layer: d.Product, run: _Run, left: Array, right: Array) -> Array:
    """The growth of the product of both sums up to now, in terms that have a binary operand each."""
    left_sum, right_sum, increments = np.zeros_like(left[0]), np.zeros_like(right[0]), []
    for t in range(run.steps):
        right_total = right_sum + right[t]
        increments.append(left[t] @ right_total + left_sum @ right[t])
        left_sum, right_sum = left_sum + left[t], right_total
    return np.stack(increments)


def _query_in_steps(_layer: d.Query, run: _Run, matrix: Array, spikes: Array) -> Array:
    complete = matrix[0]
    for t in range(1, run.steps):
        complete = complete + matrix[t]
    return np.stack([complete @ spikes[t] for t in range(run.steps)])


_STEPS: dict[str, Callable[..., Array]] = {
    **{kind: _each_step(kind) for kind in ("convolution", "add", "max_pool", "reshape", "permute")},
    "pixels": _pixels_in_steps,
    "events": lambda _layer, run, counts: np.stack([counts > t for t in range(run.steps)]).astype(np.int64),
    "total": _total_in_steps,
    "rescale": _rescale_in_steps,
    "neuron": _neuron_in_steps,
    "product": _product_in_steps,
    "query": _query_in_steps,
}
