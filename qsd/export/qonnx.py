"""Integer networks without attention as QONNX graphs, which FINN and hls4ml read.

QONNX writes integers as floats of known widths. Neurons are its ``MultiThreshold`` operations, and weights pass a
``Quant`` operation that states their width. The input of a graph is the integers of the table of pixels, of one image.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qsd._version import __version__
from qsd.errors import QsdError
from qsd.files import replacing
from qsd.integer import IntegerNetwork
from qsd.integer.description import AnyLayer
from qsd.integer.scaling import Table

_DOMAIN = "qonnx.custom_op.general"
_OPSET, _IR_VERSION = 13, 8  # What the tools around QONNX read.
_EXACT_BITS = 25  # Signed integers that float32 holds exactly.
# The reasons why a kind of layer cannot be said.
_REFUSED = {
    "product": "multiplies two activations, for which FINN and hls4ml have no layer",
    "query": "multiplies two activations, for which FINN and hls4ml have no layer",
    "rescale": "multiplies integers and shifts them right, for which QONNX has no operation that rounds alike; a "
    "network whose image and chains of convolutions meet neurons at once, or that is merged, needs none",
}


def write_qonnx(network: IntegerNetwork, path: str | Path) -> None:
    """Write an integer network as a QONNX graph.

    Args:
        network: The integer network. It must have no attention, and no running sum with an unmerged chain or the image.
        path: File to write; one that exists is replaced.

    Raises:
        QsdError: If packages are missing, or for a layer that QONNX cannot express, with its name and the reason.
    """
    for layer in network.description.layers:
        if layer.kind in _REFUSED:
            raise QsdError(f"layer {layer.name} {_REFUSED[layer.kind]}, so that QONNX cannot express the network.")
    for layer in network.description.layers:
        if layer.bits > _EXACT_BITS - (not layer.signed):
            raise QsdError(
                f"layer {layer.name} has sums of {layer.bits} bits, and QONNX computes in float32, which holds 24; use "
                "fewer fractional_bits."
            )
    model = _Graph(network).model()
    with replacing(path) as partial:
        partial.write_bytes(model.SerializeToString())


class _Graph:
    """A QONNX graph in construction.

    Args:
        network: The integer network.
    """

    def __init__(self, network: IntegerNetwork) -> None:
        try:
            import onnx
        except ImportError as error:
            raise QsdError("writing QONNX files needs more packages: pip install 'qsd[export]'.") from error
        self.onnx, self.network = onnx, network
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inner: list[Any] = []

    def model(self) -> Any:
        """The ONNX ``ModelProto``."""
        helper, description = self.onnx.helper, self.network.description
        for layer in description.layers:
            _NODES[layer.kind](self, layer)
        first, last = description.layers[0], self.network.layer(description.output)
        floats = self.onnx.TensorProto.FLOAT
        shapes = {layer.name: [1, *layer.shape] for layer in description.layers}
        known = {name: helper.make_tensor_value_info(name, floats, shape) for name, shape in shapes.items()}
        ends = [known.pop(layer.name) for layer in (first, last)]
        inner = [*known.values(), *self.inner]
        graph = helper.make_graph(self.nodes, "qsd", ends[:1], ends[1:], self.constants, value_info=inner)
        imports = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSION, producer_name="qsd")
        model.producer_version = __version__
        return model

    def array(self, layer: AnyLayer, name: str) -> np.ndarray[Any, Any]:
        """An array of a layer, int64."""
        return self.network.arrays[f"{layer.name}/{name}"].astype(np.int64)

    def constant(self, name: str, values: Any, kind: type = np.float32) -> str:
        """Add a constant and return its name."""
        self.constants.append(self.onnx.numpy_helper.from_array(np.asarray(values, kind), name))
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add an operation and return the name of its output."""
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def note(self, name: str, shape: Sequence[int]) -> None:
        """State the shape of a value that is no signal of the network."""
        self.inner.append(self.onnx.helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, list(shape)))


def _pads(layer: Any) -> list[int]:
    top, bottom, left, right = layer.padding
    return [top, left, bottom, right]


def _convolution(graph: _Graph, layer: Any) -> None:
    weight, name = graph.array(layer, "weight"), layer.name
    if layer.table_shift is not None:
        weight = Table(graph.array(layer, "multiplier"), layer.table_shift).entries(weight)
    whole = graph.constant(f"{name}.weight", weight)
    width = [
        graph.constant(f"{name}.{key}", value) for key, value in (("one", 1), ("zero", 0), ("bits", layer.entry_bits))
    ]
    options = {"signed": 1, "narrow": 0, "rounding_mode": "ROUND", "domain": _DOMAIN}
    quantized = graph.add("Quant", [whole, *width], f"{name}.quantized", **options)
    graph.note(quantized, weight.shape)
    graph.add(
        "Conv",
        [layer.inputs[0], quantized],
        name,
        kernel_shape=layer.kernel,
        strides=layer.stride,
        pads=_pads(layer),
        dilations=layer.dilation,
        group=layer.groups,
    )


def _total(graph: _Graph, layer: Any) -> None:
    axes = graph.constant(f"{layer.name}.axes", [2, 3], np.int64)
    output = f"{layer.name}.sum" if layer.biased else layer.name
    graph.add("ReduceSum", [layer.inputs[0], axes], output, keepdims=1)
    if layer.biased:
        bias = graph.constant(f"{layer.name}.bias", graph.array(layer, "bias").reshape(1, -1, 1, 1))
        graph.add("Add", [output, bias], layer.name)
        graph.note(output, (1, *layer.shape))


def _neuron(graph: _Graph, layer: Any) -> None:
    membrane = layer.inputs[0]
    if layer.directed:
        shape = (1, -1, *[1] * (len(layer.shape) - 1))
        sign = graph.constant(f"{layer.name}.direction", graph.array(layer, "direction").reshape(shape))
        membrane = graph.add("Mul", [membrane, sign], f"{layer.name}.membrane")
        graph.note(membrane, (1, *layer.shape))
    thresholds = graph.constant(f"{layer.name}.thresholds", graph.array(layer, "thresholds"))
    graph.add("MultiThreshold", [membrane, thresholds], layer.name, out_dtype=f"UINT{layer.bits}", domain=_DOMAIN)


def _max_pool(graph: _Graph, layer: Any) -> None:
    options = {"kernel_shape": layer.kernel, "strides": layer.stride, "pads": _pads(layer)}
    graph.add("MaxPool", layer.inputs, layer.name, dilations=layer.dilation, **options)


def _reshape(graph: _Graph, layer: Any) -> None:
    shape = graph.constant(f"{layer.name}.shape", [0, *layer.shape], np.int64)
    graph.add("Reshape", [*layer.inputs, shape], layer.name)


def _permute(graph: _Graph, layer: Any) -> None:
    graph.add("Transpose", layer.inputs, layer.name, perm=[0, *[axis + 1 for axis in layer.axes]])


_NODES: dict[str, Callable[[_Graph, Any], Any]] = {
    "pixels": lambda _graph, _layer: None,
    "events": lambda _graph, _layer: None,
    "convolution": _convolution,
    "add": lambda graph, layer: graph.add("Add", layer.inputs, layer.name),
    "total": _total,
    "neuron": _neuron,
    "max_pool": _max_pool,
    "reshape": _reshape,
    "permute": _permute,
}
