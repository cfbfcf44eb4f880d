"""A converted network as a graph in the count domain: one pass, no time axis, any number of images.

PyTorch's ONNX exporter makes the graph. Files with floats hold it as it is. For integer ONNX files and for NIR every
converted layer stays one node, and a writer (`qsd.export.writers`) replaces the node by its operations afterwards. So
NIR graphs, too, are built from an ONNX graph, which nobody sees.
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.export.writers import Writers
from qsd.spiking import SpikingNetwork
from qsd.spiking.layers import DelayedNeuron, SpikingEvents, SpikingFrameAxis, TimedLayer
from qsd.spiking.streaming import run_frame

# Versions of the files, of the format and of ONNX's operations: the first ones with integers of 4 bits.
OPSET, IR_VERSION = 21, 10
# Versions of files without them. In version 18 `ReduceMean` got its axes as an input.
EARLY_OPSET, EARLY_IR_VERSION = 18, 8
DOMAIN = "qsd"  # Operator domain of the nodes that stand for a whole layer.


def check_target(spiking: SpikingNetwork, path: Path) -> None:
    """Refuse a target or a network that cannot be written, before any work begins.

    Args:
        spiking: The network.
        path: File to write.

    Raises:
        QsdError: If the folder is missing, or if the delay of a neuron is below T - 1.
    """
    if not path.parent.is_dir():
        raise QsdError(f"the folder {path.parent} does not exist; make it first.")
    if (early := spiking.early_neuron()) is not None:
        raise QsdError(
            f"neuron {early.name} fires before its input is complete, which a file without time steps cannot express; "
            "convert with the lossless delays, delay=None."
        )


def trace(spiking: SpikingNetwork, example: Tensor, writers: Writers | None = None) -> Any:
    """Trace a network.

    Args:
        spiking: The network; it is not changed.
        example: Images ``[B, C, H, W]``; the graph takes images of their height and width.
        writers: Writers of the layers that stay one node each; ``None`` to write all layers out as ONNX operations.

    Returns:
        An ONNX ``ModelProto`` with inputs ``images`` and outputs ``logits``.

    Raises:
        QsdError: If packages are missing, if a layer has no writer or runs several times in a pass, and for networks
            with several outputs.
    """
    try:
        import onnxscript  # noqa: F401 - PyTorch's exporter needs it
    except ImportError as error:
        raise QsdError("writing ONNX files needs more packages: pip install 'qsd[export]'.") from error
    copied = copy.deepcopy(spiking).cpu().float()
    network, single = copied.network, runs_single_frames(spiking)
    # PyTorch takes a batch of one image for a constant, and would fix the graph to it.
    images = example[:1].cpu().float()
    images = images.expand(2, *images.shape[1:]).clone()
    images = images[:, 0] if single else images
    with copied.runtime.running("count", remainders={} if single else None):
        if writers is not None:
            writers.check(network)
            _replace_layers(network, writers, _output_shapes(network, images))
        states = _states(copied, images) if single else {}
        return _export(_SingleFrame(copied, [*states]) if single else network, images, states)


def _export(network: nn.Module, images: Tensor, states: dict[str, Tensor]) -> Any:
    """Let PyTorch write the graph; states of neurons are further inputs and outputs."""
    batch = torch.export.Dim("batch")
    inputs: tuple[Any, ...] = (images, [*states.values()]) if states else (images,)
    shapes = ({0: batch}, [{0: batch}] * len(states)) if states else ({0: batch},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            inputs,
            dynamo=True,
            verbose=False,
            input_names=["images", *(f"state.{name}" for name in states)],
            output_names=["logits", *(f"next.{name}" for name in states)],
            dynamic_shapes=shapes,
        )
    assert program is not None
    model = program.model_proto
    pin_versions(model, OPSET, IR_VERSION)
    _forget_sources(model)
    return model


def _forget_sources(model: Any) -> None:
    """Delete the notes of PyTorch's exporter about source files, which take more room than the operations."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]


def pin_versions(model: Any, opset: int, ir_version: int) -> None:
    """Set the versions of the format and of ONNX's operations, whatever PyTorch's exporter of today chooses.

    The operations of a converted network mean the same in all versions of them from 18 to 21.

    Args:
        model: ONNX ``ModelProto``.
        opset: Version of ONNX's operations.
        ir_version: Version of the format.
    """
    for entry in model.opset_import:
        if entry.domain == "":
            assert EARLY_OPSET <= entry.version <= OPSET
            entry.version = opset
    model.ir_version = ir_version


def runs_single_frames(spiking: SpikingNetwork) -> bool:
    """Whether a graph of the network takes one frame at a time, unless frames are channels.

    Args:
        spiking: The network.
    """
    return any(isinstance(m, SpikingFrameAxis) and m.mode != "channels" for m in spiking.network.modules())


@torch.no_grad()
def _states(spiking: SpikingNetwork, frame: Tensor) -> dict[str, Tensor]:
    """Zeros in the shape of every neuron's remainder, by name."""
    if all(neuron.memory is None for neuron in spiking.neurons().values()):
        return {}
    return {name: torch.zeros_like(state) for name, state in run_frame(spiking, frame)[1].items()}


class _SingleFrame(nn.Module):
    """A network that runs one frame, with the neurons' remainders as a further input and output.

    Args:
        spiking: The network.
        names: Names of the neurons with a memory, in the order of the states.
    """

    def __init__(self, spiking: SpikingNetwork, names: list[str]) -> None:
        super().__init__()
        self.network, self._runtime, self._names = spiking.network, spiking.runtime, names

    def forward(self, images: Tensor, states: list[Tensor] | None = None) -> Any:
        """``[B, C, H, W]`` and remainders to logits, and the remainders for the next frame."""
        remainders = self._runtime.run.remainders
        assert remainders is not None
        remainders.clear()
        remainders.update(zip(self._names, states or []))
        logits = self.network(images)
        return logits if states is None else (logits, *(remainders[name] for name in self._names))


@torch.no_grad()
def _output_shapes(network: nn.Module, images: Tensor) -> dict[nn.Module, tuple[int, ...]]:
    """The shape of every layer's output for one image."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def keep(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        if layer in shapes:
            raise QsdError(
                f"layer {layer.name} runs several times in a pass, and only a layer that runs once can be written; use "
                "one layer for each call."
            )
        shapes[layer] = tuple(output.shape[1:])

    handles = [layer.register_forward_hook(keep) for layer in network.modules() if isinstance(layer, TimedLayer)]
    output = network(images)
    for handle in handles:
        handle.remove()
    if not isinstance(output, Tensor):
        raise QsdError("only classifiers, which return one tensor, can be written as ONNX files.")
    return shapes


def _replace_layers(module: nn.Module, writers: Writers, shapes: Mapping[nn.Module, tuple[int, ...]]) -> None:
    """Put a stand-in, which is traced as one node, in the place of every layer with a writer."""
    for key, child in list(module.named_children()):
        if not writers.has_writer(child):
            _replace_layers(child, writers, shapes)
        elif child in shapes:  # A layer that never runs has no node.
            kind = _NeuronNode if isinstance(child, DelayedNeuron) else _LayerNode
            setattr(module, key, kind(child, shapes[child]))


class _LayerNode(nn.Module):
    """A layer as one node of the graph.

    Its output are spike counts as unsigned bytes if the layer hands spikes on, else currents as floats.

    Args:
        layer: The layer. A list hides it from PyTorch, so that its weights do not get into the graph.
        shape: Shape of its output for one image.
    """

    def __init__(self, layer: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._layer, self._shape = [layer], shape

    @property
    def layer(self) -> Any:
        """The layer."""
        return self._layer[0]

    def node(self, inputs: tuple[Tensor, ...], dtype: torch.dtype, **more: Any) -> Tensor:
        """The output of the node.

        Args:
            inputs: Inputs of the node.
            dtype: Type of the output.
            more: Attributes of the node.
        """
        attributes, shape = {"layer": self.layer.name, **more}, [inputs[0].shape[0], *self._shape]
        return torch.onnx.ops.symbolic(f"{DOMAIN}::Layer", inputs, attributes, dtype=dtype, shape=shape, version=1)

    def forward(self, *inputs: Tensor) -> Tensor:
        spikes = isinstance(self.layer.source(), DelayedNeuron | SpikingEvents)
        return self.node(inputs, torch.uint8 if spikes else torch.float32)


class _NeuronNode(_LayerNode):
    """A neuron as one node: currents, and perhaps the value of their unit, to spike counts.

    Its threshold is an attribute of the node.
    """

    def forward(self, *inputs: Any) -> Tensor:
        x, scale = inputs if len(inputs) == 2 else (*inputs, 1.0)
        neuron = self.layer
        threshold = neuron.threshold_at(scale)
        # Neurons with a threshold each have no single number for it. A writer of theirs asks the layer.
        counts = self.node((x,), torch.uint8, threshold=0.0 if isinstance(threshold, Tensor) else float(threshold))
        return counts.float() * neuron.amplitude if neuron.scaled else counts

    def step_size(self, features: int) -> float:
        """See `DelayedNeuron`."""
        return self.layer.step_size(features)


@dataclass(frozen=True)
class LayerCall:
    """A node of the graph that stands for a layer.

    Attributes:
        layer: The converted layer.
        inputs: Names of the values that it gets.
        output: Name of the value that it gives.
        threshold: The one threshold of a layer of neurons, in units of its input; 0 for other layers.
    """

    layer: Any
    inputs: tuple[str, ...]
    output: str
    threshold: float = 0.0


def layer_call(node: Any, layers: Mapping[str, Any]) -> LayerCall | None:
    """The layer that a node stands for, or ``None`` for an operation of ONNX.

    Args:
        node: ONNX ``NodeProto`` of a traced graph.
        layers: Converted layers by name, see `layers_by_name`.
    """
    if node.domain != DOMAIN:
        return None
    attributes = {attribute.name: attribute for attribute in node.attribute}
    threshold = attributes["threshold"].f if "threshold" in attributes else 0.0
    return LayerCall(layers[attributes["layer"].s.decode()], tuple(node.input), node.output[0], threshold)


def layers_by_name(spiking: SpikingNetwork) -> dict[str, Any]:
    """All converted layers by their dotted names in the trained model.

    Args:
        spiking: The network.
    """
    return {module.name: module for module in spiking.network.modules() if isinstance(module, TimedLayer)}
