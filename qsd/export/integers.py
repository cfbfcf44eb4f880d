"""The nodes of an integer network: what every layer of ours becomes in ONNX."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.export.graph import DOMAIN
from qsd.export.requantization import IntegerWeights, Requantization
from qsd.spiking import SpikingNetwork
from qsd.spiking.batches import Images, image_batches
from qsd.spiking.layers import Convolution, SpikingChain, SpikingDense, SpikingMaxPool
from qsd.spiking.rules import Merge

# A quotient of a tie and a threshold that is smaller by this lies above the tie, where halves are to be rounded up.
_ULPS = 4
# ONNX Runtime's own operations: the product of integer matrices with scale and bias in one.
_RUNTIME_DOMAIN = "com.microsoft"


Ranges = dict[str, tuple[NDArray[Any], NDArray[Any]]]


@dataclass
class Grid:
    """The 8-bit values of an inner activation, between two convolutions of a chain: ``unit * (q - zero_point)``.

    Attributes:
        unit: what one level of every channel is worth, ``[C]``.
        zero_point: level that stands for 0, 0 to 255.
        depthwise: whether the convolution behind is; else the units are powers of two times the smallest.
    """

    unit: NDArray[Any]
    zero_point: int
    depthwise: bool

    @classmethod
    def over(cls, low: NDArray[Any], high: NDArray[Any], after: Convolution, weights: IntegerWeights) -> "Grid":
        """The grid that just holds what was seen.

        Args:
            low: least value by channel, ``[C]``, not positive.
            high: largest one, not negative.
            after: the convolution behind.
            weights: its integers, in which small powers of two find room.
        """
        levels, depthwise = weights.levels(), after.groups == len(low) == len(after.bias)
        zero = round(levels * float(np.max(-low) / max(np.max(high) + np.max(-low), 1e-30)))
        zero = min(max(zero, levels // 8), levels - levels // 8) if np.max(-low) > 0 else 0
        needed = np.maximum(high / (levels - zero), -low / zero if zero else 0.0)
        coarsest = max(float(needed.max()), 1e-30)
        if depthwise:
            return cls(np.maximum(needed, coarsest / 2**10), zero, True)
        finer = 2.0 ** np.floor(np.log2(coarsest / np.maximum(needed, coarsest / 2**10)))
        return cls(coarsest / np.minimum(finer, weights.room() if after.groups == 1 else 1.0), zero, False)


@torch.no_grad()
def calibrate(spiking: SpikingNetwork, images: Images | None, round_inner: Merge = True) -> dict[str, Grid]:
    """Grids of inner activations, from their least and largest value on images.

    Args:
        spiking: the network.
        images: a tensor or a data loader.
        round_inner: of all chains, none, those with a frame (``"rep"``) or without (``"sep"``).

    Returns:
        By the dotted name of the convolution that gives the activation. Networks without chains of several
        convolutions have none, and need no images.

    Raises:
        QsdError: if there are inner activations and no images.
    """
    inner: dict[str, tuple[Convolution, Convolution]] = {}
    for name, chain in spiking.chains().items():
        factors = list(_convolutions(chain).items())
        kind = "rep" if any(factor.frame is not None for _, factor in factors) else "sep"
        if round_inner not in (True, kind):
            continue
        inner |= {f"{name}.{key}": (factor, after) for (key, factor), (_, after) in pairwise(factors)}
    if not inner:
        return {}
    if images is None:
        raise QsdError("an integer file needs images to find the ranges of inner activations with; pass images=...")
    ranges: Ranges = {
        name: (np.zeros(len(factor.bias)), np.zeros(len(factor.bias))) for name, (factor, _) in inner.items()
    }
    with _watching({name: factor for name, (factor, _) in inner.items()}, ranges):
        for batch, _ in image_batches(images, spiking):
            spiking(batch)
    grids = {}
    for name, (_, after) in inner.items():
        weights = IntegerWeights.of(after, _key_after(spiking, name, after), name, spiking)
        grids[name] = Grid.over(*ranges[name], after, weights)
    return grids


@contextmanager
def _watching(factors: dict[str, Convolution], ranges: Ranges) -> Iterator[None]:
    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            low, high = (t.cpu().double().numpy() for t in (output.amin((0, 2, 3)), output.amax((0, 2, 3))))
            ranges[name] = np.minimum(ranges[name][0], low), np.maximum(ranges[name][1], high)

        return hook

    handles = [factor.register_forward_hook(watch(name)) for name, factor in factors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _convolutions(chain: SpikingChain) -> dict[str, Convolution]:
    """What the count domain evaluates."""
    if chain.merged is not None and chain.merged_counts:
        return {"merged": chain.merged}
    return chain.convolutions


def _key(spiking: SpikingNetwork, chain: str, factor: str) -> str:
    """Of a convolution's weights in the trained model: in a chain, or a convolution by itself."""
    key = f"{chain}.{factor}.weight"
    return key if key in spiking.trained.tensors else f"{chain}.weight"


def _key_after(spiking: SpikingNetwork, name: str, after: Convolution) -> str:
    chain = name.rpartition(".")[0]
    factor = next(key for key, factor in _convolutions(spiking.chains()[chain]).items() if factor is after)
    return _key(spiking, chain, factor)


@dataclass
class IntegerGraph:
    """Writes the nodes of a traced network (`qsd.export.graph.trace`) out as ONNX's own.

    Args:
        spiking: the network.
        model: ONNX model, whose graph is changed.
        grids: see `calibrate`.
    """

    spiking: SpikingNetwork
    model: Any
    grids: dict[str, Grid]
    nodes: list[Any] = field(default_factory=list)

    def write_out(self) -> None:
        """Replace all nodes of ours.

        Raises:
            QsdError: for layers that have no integers.
        """
        import onnx

        self._onnx, graph = onnx, self.model.graph
        self._layers: dict[str, Any] = {
            m.name: m
            for m in self.spiking.network.modules()
            if isinstance(m, SpikingChain | SpikingDense | SpikingMaxPool)
        }
        self._is_counts = self._counts(graph)
        self._widths = {
            value.name: value.type.tensor_type.shape.dim[-1].dim_value
            for value in graph.value_info
            if value.type.tensor_type.shape.dim
        }
        users: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                users.setdefault(name, []).append(node)
        outputs = {output.name for output in graph.output}
        merged: set[str] = set()  # currents that exist only as counts
        for node in graph.node:
            if node.domain != DOMAIN:
                self.nodes.append(node)
                continue
            layer, x, y = self._attribute(node, "layer"), node.input[0], node.output[0]
            if node.op_type == "Neuron":
                if x not in merged:
                    self._neuron(layer, x, y, self._attribute(node, "threshold"))
            elif node.op_type == "Chain":
                after = users.get(y, [])
                alone = len(after) == 1 and after[0].op_type == "Neuron" and y not in outputs
                if alone and x in self._is_counts:
                    threshold, name = self._attribute(after[0], "threshold"), self._attribute(after[0], "layer")
                    if self._chain_to_counts(layer, x, after[0].output[0], threshold, name):
                        merged.add(y)
                        continue
                self._chain(layer, x, y)
            elif node.op_type == "Dense":
                self._dense(layer, x, y)
            else:
                self._max_pool(layer, x, y)
        del graph.node[:]
        graph.node.extend(self.nodes)
        imports = [entry for entry in self.model.opset_import if entry.domain != DOMAIN]
        del self.model.opset_import[:]
        self.model.opset_import.extend(imports)
        self.model.opset_import.append(self._onnx.helper.make_opsetid(_RUNTIME_DOMAIN, 1))

    def _counts(self, graph: Any) -> set[str]:
        """Names of values that are counts, perhaps pooled."""
        counts: set[str] = set()
        for node in graph.node:
            pooled = node.op_type == "MaxPool" and node.input[0] in counts
            if node.domain == DOMAIN and (node.op_type == "Neuron" or pooled):
                counts.add(node.output[0])
        return counts

    def _attribute(self, node: Any, name: str) -> Any:
        value = next(self._onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)
        return value.decode() if isinstance(value, bytes) else value

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self._onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def _constant(self, name: str, values: Any, dtype: type) -> str:
        tensor = self._onnx.numpy_helper.from_array(np.asarray(values, dtype), name)
        self.model.graph.initializer.append(tensor)
        return name

    def _neuron(self, name: str, x: str, y: str, threshold: float) -> None:
        scale = np.float32(threshold)
        for _ in range(_ULPS):
            scale = np.nextafter(scale, np.float32(0))
        inputs = [
            x,
            self._constant(f"{name}.threshold", scale, np.float32),
            self._constant(f"{name}.zero", 0, np.uint8),
        ]
        self._clip(name, self._add("QuantizeLinear", inputs, f"{name}.drive"), y)

    def _clip(self, name: str, x: str, y: str) -> None:
        """At most T spikes."""
        self._add("Clip", [x, "", self._constant(f"{name}.time_steps", self.spiking.time_steps, np.uint8)], y)

    def _chain_to_counts(self, name: str, x: str, y: str, threshold: float, neuron: str) -> bool:
        """A chain and the neuron behind, if counts come out as they should."""
        factors = _convolutions(self._layers[name])
        *_, last = factors
        if not self._is_integer(name):
            return False
        weights = self._weights(name, last)
        if len(factors) == 1:
            fitted = Requantization.counting(weights, threshold, self.spiking.time_steps)
            if fitted is None:
                return False
            source, grid = x, None
        else:
            source, grid = self._inner(name, x)
            assert grid is not None
            fitted = Requantization.rounded(weights.taking(grid.unit, grid.depthwise), 255, threshold)
        counts = self._quantized(name, last, fitted, source, grid, None, f"{neuron}.drive")
        self._clip(neuron, counts, y)
        return True

    def _chain(self, name: str, x: str, y: str) -> None:
        """A chain whose output is a sum of currents, in floats."""
        *_, last = _convolutions(self._layers[name])
        if x not in self._is_counts:  # an image
            self._float_chain(name, x, y)
            return
        if not self._is_integer(name):
            spikes = self._add("Cast", [x], f"{name}.spikes", to=self._onnx.TensorProto.FLOAT)
            self._float_chain(name, spikes, y)
            return
        source, grid = self._inner(name, x)
        weights, label = self._weights(name, last), f"{name}.{last}"
        if grid is not None:
            weights = weights.taking(grid.unit, grid.depthwise)
        zero = 0 if grid is None else grid.zero_point
        geometry = self._geometry(name, last)
        currents = self._currents(label, weights, source, zero, self._widths[y], geometry)
        self._add("Transpose", [currents], y, perm=[0, 3, 1, 2])

    def _currents(
        self, label: str, weights: IntegerWeights, x: str, zero_point: int, width: int, geometry: dict[str, Any]
    ) -> str:
        """What a convolution makes of an integer map, in floats, ``[N, H, W, C]``, ``width`` pixels wide."""
        zero = self._constant(f"{label}.input_zero", zero_point, np.uint8)
        unit = self._constant(f"{label}.unit", weights.scale.reshape(-1), np.float32)
        bias = self._constant(f"{label}.bias", weights.bias.reshape(-1), np.float32)
        if geometry["group"] > 1:
            whole = self._constant(f"{label}.weight", weights.integers, np.int8)
            total = self._add("ConvInteger", [x, whole, zero], f"{label}.map", **geometry)
            total = self._add("Transpose", [total], f"{label}.sum", perm=[0, 2, 3, 1])
        else:
            x = self._add("Transpose", [x], f"{label}.pixels", perm=[0, 2, 3, 1])
            if any(geometry["pads"]):
                top, left, bottom, right = geometry["pads"]
                around = self._constant(f"{label}.pads", [0, top, left, 0, 0, bottom, right, 0], np.int64)
                x = self._add("Pad", [x, around, zero], f"{label}.padded")
            if geometry["kernel_shape"] == geometry["strides"] == [1, 1]:
                matrix = self._constant(f"{label}.weight", weights.integers[:, :, 0, 0].T, np.int8)
                one = self._constant(f"{label}.input_scale", 1, np.float32)
                inputs = [x, matrix, one, unit, zero, "", bias]
                return self._add("MatMulIntegerToFloat", inputs, f"{label}.current", domain=_RUNTIME_DOMAIN)
            total = self._sums(label, weights.integers, x, zero, width, geometry)
        # DequantizeLinear would say the same, on one thread.
        values = self._add("Cast", [total], f"{label}.float", to=self._onnx.TensorProto.FLOAT)
        values = self._add("Mul", [values, unit], f"{label}.scaled")
        return self._add("Add", [values, bias], f"{label}.current")

    def _sums(self, label: str, weight: NDArray[Any], x: str, zero: str, width: int, geometry: dict[str, Any]) -> str:
        """A convolution's accumulators, int32, as products of matrices: twenty times as fast as ConvInteger.

        What a row of the kernel sees is laid side by side. One product then gives what every row of the kernel
        contributes, and these are added, each from a row of the map further on.
        """
        side, stride, outputs = geometry["kernel_shape"][0], geometry["strides"][0], len(weight)
        seen = self._constant(f"{label}.seen", stride * np.arange(width)[:, None] + np.arange(side), np.int64)
        x = self._add("Gather", [x, seen], f"{label}.columns", axis=2)
        x = self._add("Reshape", [x, self._constant(f"{label}.flat", [0, 0, 0, -1], np.int64)], f"{label}.rows")
        if stride == 1:
            whole = self._constant(f"{label}.weight", weight.transpose(3, 1, 2, 0).reshape(-1, side * outputs), np.int8)
            product = self._add("MatMulInteger", [x, whole, zero], f"{label}.product")
            parts = [self._rows(f"{label}.part{i}", product, i, side, 1, outputs) for i in range(side)]
        else:  # rows that are left out need no product
            parts = []
            for i in range(side):
                matrix = weight[:, :, i].transpose(2, 1, 0).reshape(-1, outputs)
                whole = self._constant(f"{label}.weight{i}", matrix, np.int8)
                rows = self._rows(f"{label}.rows{i}", x, i, side, stride)
                parts.append(self._add("MatMulInteger", [rows, whole, zero], f"{label}.part{i}"))
        total = parts[0]
        for i, part in enumerate(parts[1:], 1):
            total = self._add("Add", [total, part], f"{label}.sum{i}")
        return total

    def _rows(self, label: str, x: str, row: int, side: int, stride: int, channels: int | None = None) -> str:
        """The rows of a map that one row of a kernel sees, and of the channels the ``row``-th so many."""
        bounds = {"start": [row], "end": [row + 1 - side or np.iinfo(np.int64).max], "axis": [1], "step": [stride]}
        if channels is not None:
            for key, value in zip(bounds, (row * channels, (row + 1) * channels, 3, 1)):
                bounds[key].append(value)
        return self._add("Slice", [x, *(self._constant(f"{label}.{k}", v, np.int64) for k, v in bounds.items())], label)

    def _is_integer(self, name: str) -> bool:
        """Whether a chain has no inner activations, or such of 8 bits."""
        return all(f"{name}.{key}" in self.grids for key in [*_convolutions(self._layers[name])][:-1])

    def _float_chain(self, name: str, x: str, y: str) -> None:
        factors = _convolutions(self._layers[name])
        for key in factors:
            weights, label = self._weights(name, key), f"{name}.{key}"
            whole = self._constant(f"{label}.weight", weights.integers, np.int8)
            unit = self._constant(f"{label}.unit", weights.scale, np.float32)
            floats = self._add("DequantizeLinear", [whole, unit], f"{label}.floats", axis=0)
            bias = self._constant(f"{label}.bias", weights.bias, np.float32)
            output = y if key == [*factors][-1] else f"{label}.output"
            x = self._add("Conv", [x, floats, bias], output, **self._geometry(name, key))

    def _inner(self, name: str, x: str) -> tuple[str, Grid | None]:
        """All convolutions of a chain but the last, from counts to an inner activation of 8 bits and its grid."""
        before: Grid | None = None
        for key in [*_convolutions(self._layers[name])][:-1]:
            weights, grid = self._weights(name, key), self.grids[f"{name}.{key}"]
            if before is not None:
                weights = weights.taking(before.unit, before.depthwise)
            rounded = Requantization.rounded(weights, 255 if before else self.spiking.time_steps, grid.unit)
            x = self._quantized(name, key, rounded, x, before, grid, f"{name}.{key}.output")
            before = grid
        return x, before

    def _quantized(
        self,
        name: str,
        key: str,
        numbers: Requantization,
        x: str,
        before: Grid | None,
        behind: Grid | None,
        output: str,
    ) -> str:
        """An integer convolution between counts (``None``) or inner activations."""
        label = f"{name}.{key}"
        # ONNX multiplies by input scale times weight scale over output scale; that product is what we have.
        inputs = [
            x,
            self._constant(f"{label}.input_scale", 1, np.float32),
            self._constant(f"{label}.input_zero", before.zero_point if before else 0, np.uint8),
            self._constant(f"{label}.weight", numbers.weight, np.int8),
            self._constant(f"{label}.multiplier", numbers.multiplier, np.float32),
            self._constant(f"{label}.weight_zero", np.zeros(len(numbers.bias)), np.int8),
            self._constant(f"{label}.output_scale", 1, np.float32),
            self._constant(f"{label}.output_zero", behind.zero_point if behind else 0, np.uint8),
            self._constant(f"{label}.bias", numbers.bias, np.int32),
        ]
        return self._add("QLinearConv", inputs, output, **self._geometry(name, key))

    def _dense(self, name: str, x: str, y: str) -> None:
        layer = self._layers[name]
        weights = IntegerWeights.of(layer, f"{name}.weight", name, self.spiking)
        whole = self._constant(f"{name}.weight", weights.integers.T, np.int8)
        unit = self._constant(f"{name}.unit", weights.scale, np.float32)
        if x in self._is_counts:
            total = self._add("MatMulInteger", [x, whole], f"{name}.sum")
            total = self._add("Cast", [total], f"{name}.float", to=self._onnx.TensorProto.FLOAT)
        else:
            # DequantizeLinear would say the same, but ONNX Runtime makes one operation of it and the product, and
            # rounds the other operand.
            floats = self._add("Cast", [whole], f"{name}.floats", to=self._onnx.TensorProto.FLOAT)
            total = self._add("MatMul", [x, floats], f"{name}.sum")
        values = self._add("Mul", [total, unit], f"{name}.scaled")
        self._add("Add", [values, self._constant(f"{name}.bias", weights.bias, np.float32)], y)

    def _max_pool(self, name: str, x: str, y: str) -> None:
        pool = self._layers[name].pool
        kernel, stride, padding, dilation = (
            [v, v] if isinstance(v, int) else list(v)
            for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        )
        self._add(
            "MaxPool",
            [x],
            y,
            kernel_shape=kernel,
            strides=stride,
            pads=[*padding, *padding],
            dilations=dilation,
            ceil_mode=int(pool.ceil_mode),
        )

    def _weights(self, name: str, key: str) -> IntegerWeights:
        factor = _convolutions(self._layers[name])[key]
        return IntegerWeights.of(factor, _key(self.spiking, name, key), name, self.spiking)

    def _geometry(self, name: str, key: str) -> dict[str, Any]:
        factor = _convolutions(self._layers[name])[key]
        # The frame of a pointwise convolution is what it makes of zeros around its input.
        padding = factor.padding + (factor.frame is not None)
        side = factor.weight.shape[-1]
        return {
            "kernel_shape": [side, side],
            "strides": [factor.stride, factor.stride],
            "pads": [padding] * 4,
            "group": factor.groups,
        }
