"""Integer graphs: the nodes of a traced network that stand for layers are replaced by ONNX's own operations."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qsd.export.four_bits import FourBits
from qsd.export.graph import (
    DOMAIN,
    EARLY_IR_VERSION,
    EARLY_OPSET,
    LayerCall,
    layer_call,
    layers_by_name,
    pin_versions,
)
from qsd.export.grids import Grid
from qsd.export.words import add_words
from qsd.export.writers import Writers
from qsd.spiking import SpikingNetwork

# The domain of ONNX Runtime's own operations.
RUNTIME_DOMAIN = "com.microsoft"

# Decorator: register the writer of a converted layer for integer ONNX files. The writer gets the layer, its `LayerCall`
# and the `IntegerGraph`, and adds operations that give the value ``call.output``.
writes = Writers("integer ONNX files", "qsd.export.writes", "write floats (integer=False)")


@dataclass
class IntegerGraph:
    """Writes the nodes of a traced network (`qsd.export.graph.trace`) out as ONNX's own.

    Args:
        spiking: The network.
        model: ONNX model, whose graph is changed.
        grids: Grids of inner activations, see `qsd.export.grids.calibrate`.
        standard: Whether to leave out operations of ONNX Runtime itself, so that other runtimes read the file.
        compact: Whether weights of 4 bits are words of a dictionary.
    """

    spiking: SpikingNetwork
    model: Any
    grids: dict[str, Grid]
    standard: bool = False
    compact: bool = False
    _nodes: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        import onnx

        self.onnx, graph, layers = onnx, self.model.graph, layers_by_name(self.spiking)
        self._types = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.output)}
        self._written: set[str] = set()
        self._constants: set[str] = set()
        self._words: dict[str, NDArray[np.int64]] = {}
        self._calls: dict[str, LayerCall] = {}
        self._users: dict[str, list[Any]] = {}
        for node in graph.node:
            call = layer_call(node, layers)
            if call is not None:
                self._calls[call.output] = call
            for name in node.input:
                self._users.setdefault(name, []).append(node)

    def write_out(self) -> None:
        """Replace the nodes of all layers.

        Raises:
            QsdError: For layers without integers.
        """
        graph = self.model.graph
        for node in graph.node:
            call = self._calls.get(node.output[0])
            if call is None:
                node.ClearField("name")  # Outputs have names; a second one for each operation takes room.
                self._nodes.append(node)
            elif call.output not in self._written:
                writes.of(call.layer)(call.layer, call, self)
        del graph.node[:]
        del graph.value_info[:]  # Runtimes find the shapes themselves.
        if self.compact:
            pin_versions(self.model, EARLY_OPSET, EARLY_IR_VERSION)
        if self._words:  # They are unpacked first.
            layers, self._nodes = self._nodes, []
            add_words(self, self._words)
            self._nodes += layers
        graph.node.extend(self._nodes)
        imports = [entry for entry in self.model.opset_import if entry.domain != DOMAIN]
        del self.model.opset_import[:]
        self.model.opset_import.extend(imports)
        if any(node.domain == RUNTIME_DOMAIN for node in self._nodes):
            self.model.opset_import.append(self.onnx.helper.make_opsetid(RUNTIME_DOMAIN, 1))

    # -- facts for writers --------------------------------------------------------------------------------------------

    def holds_counts(self, value: str) -> bool:
        """Whether a value holds spike counts, as unsigned bytes; other values are floats.

        Args:
            value: Name of a value of the traced graph.
        """
        return value in self._types and self._types[value].elem_type == self.onnx.TensorProto.UINT8

    def width(self, value: str) -> int:
        """Pixels in a row of a value.

        Args:
            value: Name of a value ``[B, C, H, W]`` of the traced graph.
        """
        return self._types[value].shape.dim[-1].dim_value

    def only_user(self, value: str) -> LayerCall | None:
        """The layer that alone uses a value, or ``None`` if there are others, or an operation of ONNX uses it.

        Args:
            value: Name of a value of the traced graph.
        """
        users = self._users.get(value, [])
        is_output = any(output.name == value for output in self.model.graph.output)
        return self._calls.get(users[0].output[0]) if len(users) == 1 and not is_output else None

    # -- additions by writers ------------------------------------------------------------------------------------------

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add an operation.

        Args:
            kind: Type of the operation.
            inputs: Names of its inputs.
            output: Name of its output.
            attributes: Its attributes; ``domain`` for an operation that is not ONNX's own.

        Returns:
            The name of its output.
        """
        self._nodes.append(self.onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, values: Any, dtype: type) -> str:
        """Add a constant.

        Args:
            name: Its name.
            values: Its values.
            dtype: NumPy's type of the values.

        Returns:
            Its name.
        """
        if isinstance(values, torch.Tensor):
            values = values.cpu().numpy()
        tensor = self.onnx.numpy_helper.from_array(np.asarray(values, dtype), name)
        self.model.graph.initializer.append(tensor)
        self._constants.add(name)
        return name

    def shared(self, values: Any, dtype: type) -> str:
        """A small constant that has its content as its name, so that the file holds it once.

        Args:
            values: A number or a short list of numbers.
            dtype: NumPy's type of the values.

        Returns:
            Its name.
        """
        numbers: NDArray[Any] = np.asarray(values, dtype)
        name = "_".join([numbers.dtype.name, *map(str, numbers.reshape(-1).tolist())])
        name = name if numbers.ndim == 0 else f"{name}_list"
        return name if name in self._constants else self.constant(name, numbers, dtype)

    def weights(self, name: str, values: Any) -> str:
        """Add weights of at most 8 bits, which take 4 bits each in the file where that is possible.

        Args:
            name: Name of the weights.
            values: Integers; powers of two by row, column, ... may be factors of them.

        Returns:
            The name of the weights as signed bytes. Runtimes compute them once, when they load the file.
        """
        small = FourBits.of(np.asarray(values, np.int64))
        if small is None:
            return self.constant(name, values, np.int8)
        types = self.onnx.TensorProto
        if self.compact:
            value = f"{name}.integers" if small.factors else name
            self._words[value] = small.integers
        else:
            value = f"{name}.int4"
            dims, packed = small.integers.shape, small.packed()
            self.model.graph.initializer.append(types(name=value, data_type=types.INT4, dims=dims, raw_data=packed))
        if not small.factors:
            return value if self.compact else self.add("Cast", [value], name, to=types.INT8)
        value = self.add("Cast", [value], self._short_name(), to=types.INT32)
        for number, factor in enumerate(small.factors):
            factors = self.constant(f"{name}.factor{number}", factor, np.int8)
            wide = self.add("Cast", [factors], self._short_name(), to=types.INT32)
            value = self.add("Mul", [value, wide], self._short_name())
        return self.add("Cast", [value], name, to=types.INT8)

    def _short_name(self) -> str:
        """A name for a value that nobody looks for; long names take room, and names of layers have no such sign."""
        return f"#{len(self._nodes)}"

    def split(self, inputs: list[str], outputs: list[str]) -> None:
        """Add a division of a tensor into parts.

        Args:
            inputs: Names of the tensor and of the sizes of its parts.
            outputs: Names of the parts.
        """
        self._nodes.append(self.onnx.helper.make_node("Split", inputs, outputs))

    def floats(self, value: str, output: str) -> str:
        """Add a conversion to floats.

        Args:
            value: Name of a value.
            output: Name of the result.

        Returns:
            The name of the result.
        """
        return self.add("Cast", [value], output, to=self.onnx.TensorProto.FLOAT)

    def finish(self, call: LayerCall) -> None:
        """Mark a layer as written, because the operations of another layer give its output.

        Args:
            call: The layer's call.
        """
        self._written.add(call.output)
