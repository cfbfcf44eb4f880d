"""NIR graphs: the nodes of a traced network become nodes of the Neuromorphic Intermediate Representation (ours).

NIR has convolutions, integrate-and-fire neurons and pools, but no clock, no initial membrane and no delayed neuron. An
integrate-and-fire neuron becomes a delayed one through its clock, an additional input of the graph. In the first step
the clock adds half a threshold, all biases and a large negative pulse. A pulse of the opposite sign opens the neuron's
firing window, and a further negative one closes it. A schedule beside the graph holds the values of each clock by step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsd.errors import QsdError
from qsd.export.graph import layer_call, layers_by_name, trace
from qsd.export.writers import Writers
from qsd.spiking import SpikingNetwork

_INSTEAD = "write the parts without it, such as to_spike_driven(model.stem), or an ONNX or packed file"

# Decorator: register the writer of a converted layer for NIR graphs. The writer gets the layer, its `LayerCall` and the
# `NirGraph`, adds nodes and clocks, and returns the `Signal` of the layer's output.
writes_nir = Writers("NIR graphs", "qsd.export.writes_nir", _INSTEAD)

_NONE = {"Cast", "Identity"}  # Operations that change no value.
_VECTOR = {"Reshape", "Flatten"}  # Operations that change no vector.


@dataclass
class Signal:
    """A value of the traced graph.

    Attributes:
        nodes: Nodes of the NIR graph, whose outputs add up to it.
        constant: Its sum over the window without any spike, ``[C, H, W]`` or ``[C]``. It goes through the clock.
        bound: Its sum over time up to any step is at most this.
        arrival: Time steps between the window of the image and its own.
        binary: Whether it holds spikes instead of currents.
    """

    nodes: tuple[str, ...]
    constant: Tensor
    bound: float
    arrival: int = 0
    binary: bool = False


@dataclass
class NirGraph:
    """A NIR graph in the making.

    Args:
        spiking: The network.
        largest_pixel: Largest absolute value of a normalised pixel.
    """

    spiking: SpikingNetwork
    largest_pixel: float
    clocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    _nodes: dict[str, Any] = field(default_factory=dict)
    _edges: list[tuple[str, str]] = field(default_factory=list)
    _signals: dict[str, Signal] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import nir

        self.nir = nir
        self._layers = layers_by_name(self.spiking)
        self._constants: dict[str, Any] = {}

    def write(self) -> tuple[Any, int]:
        """Write the network.

        Returns:
            The NIR graph, and the time steps of a run.

        Raises:
            QsdError: For what NIR cannot express.
        """
        example = self.spiking.example
        graph = trace(self.spiking, example, writes_nir).graph
        self._refuse_products(graph)
        shape = tuple(example.shape[1:])
        self.add("image", self.nir.Input({"input": np.array(shape)}))
        self._signals["images"] = Signal(("image",), torch.zeros(shape), self.largest_pixel)
        self._constants = {str(tensor.name): tensor for tensor in graph.initializer}
        self._constants |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
        known = set(self._constants)
        for node in graph.node:
            if not node.input or all(name in known for name in node.input):
                known |= set(node.output)  # A constant.
            else:
                self._signals[node.output[0]] = self._signal(node)
        result = self._signals[graph.output[0].name]
        self.add("sums", self.nir.I(np.ones(tuple(result.constant.shape), np.float32)), *result.nodes)
        self.add_clock("sums", result.constant, {})
        self.add("output", self.nir.Output({"output": np.array(result.constant.shape)}), "sums")
        return self.nir.NIRGraph(self._nodes, self._edges), result.arrival + self.spiking.time_steps

    def _signal(self, node: Any) -> Signal:
        call = layer_call(node, self._layers)
        if call is not None:
            return writes_nir.of(call.layer)(call.layer, call, self)
        inputs = [self._signals[name] for name in node.input if name in self._signals]
        if node.op_type == "Add" and len(inputs) == 2 and inputs[0].constant.shape == inputs[1].constant.shape:
            left, right = inputs
            arrival = max(left.arrival, right.arrival)
            return Signal(left.nodes + right.nodes, left.constant + right.constant, left.bound + right.bound, arrival)
        if self._averages_positions(node) and inputs[0].constant.dim() == 3:
            return self.add_mean(node.output[0], inputs[0])
        if len(inputs) == 1 and (node.op_type in _NONE or (node.op_type in _VECTOR and inputs[0].constant.dim() == 1)):
            return inputs[0]
        sources = sorted({name.removesuffix(".merged") for signal in inputs for name in signal.nodes})
        raise QsdError(f"NIR cannot express the operation {node.op_type} behind {', '.join(sources)}; {_INSTEAD}.")

    def _averages_positions(self, node: Any) -> bool:
        """Whether an operation is the mean over all positions of ``[B, C, H, W]``."""
        import onnx

        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in self._constants:
            return False
        axes = onnx.numpy_helper.to_array(self._constants[node.input[1]])
        keeps = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
        return not keeps and sorted(int(axis) % 4 for axis in axes) == [2, 3]

    def _refuse_products(self, graph: Any) -> None:
        """Name the neurons whose spikes are multiplied by each other, before any other reason for refusal."""
        sources: dict[str, str] = {}  # By value the last layer before it.
        for node in graph.node:
            call = layer_call(node, self._layers)
            inputs = [sources[name] for name in node.input if name in sources]
            if call is not None:
                sources[call.output] = call.layer.name
            elif len(inputs) == 2 and "MatMul" in node.op_type:
                raise QsdError(f"NIR has no product of two activations, such as {' and '.join(inputs)}; {_INSTEAD}.")
            elif inputs:
                sources[node.output[0]] = inputs[0]

    # -- additions by writers ------------------------------------------------------------------------------------------

    def signal(self, value: str) -> Signal:
        """A value that was written before.

        Args:
            value: Name of a value of the traced graph, such as an input of a `LayerCall`.
        """
        return self._signals[value]

    def add(self, name: str, node: Any, *sources: str) -> tuple[str, ...]:
        """Add a node.

        Args:
            name: Its name.
            node: A node of the package ``nir``.
            sources: Nodes whose outputs add up to its input.

        Returns:
            Its name, as `Signal` takes it.
        """
        self._nodes[name] = node
        self._edges += [(source, name) for source in sources]
        return (name,)

    def add_mean(self, name: str, x: Signal) -> Signal:
        """Add the mean over all positions.

        Args:
            name: Name for its nodes.
            x: A signal ``[C, H, W]``.

        Returns:
            The signal of the mean, ``[C]``.
        """
        channels, height, width = x.constant.shape
        size = np.array([height, width])
        nodes = self.add(f"mean.{name}", self.nir.AvgPool2d(size, size, np.array([0, 0])), *x.nodes)
        pooled = {"input": np.array([channels, 1, 1])}
        nodes = self.add(f"vector.{name}", self.nir.Flatten(pooled, 0, -1), *nodes)
        return Signal(nodes, x.constant.mean((1, 2)), x.bound, x.arrival, x.binary)

    def add_clock(self, name: str, start: Tensor, pulses: Mapping[int, float]) -> None:
        """Add the clock of a node: an input of the graph.

        Args:
            name: The node.
            start: Value that the clock adds in the first time step, ``[C, H, W]`` or ``[C]``.
            pulses: Values that it adds to all neurons in further time steps.
        """
        # Few vectors of channels occur in all positions (interior, borders), and each gets a channel of the clock.
        rows = start.flatten(1).T if start.dim() == 3 else start.unsqueeze(0)
        kinds, labels = torch.unique(rows, dim=0, return_inverse=True)
        clock, size = f"clock.{name}", tuple(start.shape[1:])
        weight = torch.cat([torch.ones(1, len(start)), kinds]).T.contiguous().numpy()
        self.add(clock, self.nir.Input({"input": np.array([1 + len(kinds), *size])}))
        if size:
            bias = np.zeros(len(start), np.float32)
            spread = self.nir.Conv2d(size, weight[:, :, None, None], 1, 0, 1, 1, bias)
        else:
            spread = self.nir.Linear(weight)
        self.add(f"{clock}.spread", spread, clock)
        self._edges.append((f"{clock}.spread", name))
        self.clocks[clock] = {
            "pulses": {str(step): value for step, value in pulses.items()},
            "start": labels.reshape(size).tolist() if size else 0,
        }
