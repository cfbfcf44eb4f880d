"""Converted networks in the Neuromorphic Intermediate Representation (NIR), for chips and simulators (ours).

NIR has convolutions, integrate-and-fire neurons and pools, but no clock, no initial membrane and no delayed neuron. An
integrate-and-fire neuron becomes a delayed one by what a clock feeds it: half a threshold, all biases and a large
negative pulse in the first step, which the window's opening takes back and its end repeats. These clocks are inputs of
the graph; a schedule tells what to feed them and when.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsd.errors import QsdError
from qsd.export.graph import check_target, trace
from qsd.files import replacing
from qsd.spiking import SpikingNetwork
from qsd.spiking.layers import DelayedNeuron, SpikingChain, SpikingDense, SpikingMaxPool

_NONE = {"Cast", "Identity"}  # what changes no value
_VECTOR = {"Reshape", "Flatten"}  # the same for a vector
_INSTEAD = "write the parts without it, such as to_spike_driven(model.stem), or an ONNX or packed file."


@dataclass
class _Signal:
    """A value of the traced graph.

    Attributes:
        nodes: of the NIR graph, whose outputs add up to it.
        constant: what it is in total without any spike, ``[C, H, W]`` or ``[C]``: it goes through the clock.
        bound: no larger than this does its sum over time become, up to any step, or infinite.
        arrival: steps by which its window lies behind the image's.
        binary: spikes, not currents.
    """

    nodes: tuple[str, ...]
    constant: Tensor
    bound: float
    arrival: int = 0
    binary: bool = False


@dataclass
class _Writer:
    spiking: SpikingNetwork
    example: Tensor
    largest: float
    nodes: dict[str, Any] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)
    clocks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import nir

        self.nir = nir
        self.layers: dict[str, Any] = {
            module.name: module
            for module in self.spiking.network.modules()
            if isinstance(module, SpikingChain | SpikingDense | SpikingMaxPool | DelayedNeuron)
        }

    def add(self, name: str, node: Any, *sources: str) -> tuple[str, ...]:
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]
        return (name,)

    def write(self) -> tuple[Any, int]:
        """The graph, and how many steps a run takes."""
        graph = trace(self.spiking, self.example, whole_layers=True).graph
        shape = tuple(self.example.shape[1:])
        self.add("image", self.nir.Input({"input": np.array(shape)}))
        signals = {"images": _Signal(("image",), torch.zeros(shape), self.largest)}
        known = {str(tensor.name) for tensor in graph.initializer}
        _refuse_products(graph)
        for node in graph.node:
            if not node.input or all(name in known for name in node.input):
                known |= set(node.output)
                continue
            signals[node.output[0]] = self._signal(node, [signals[n] for n in node.input if n in signals])
        result = signals[graph.output[0].name]
        self.add("sums", self.nir.I(np.ones(tuple(result.constant.shape), np.float32)), *result.nodes)
        self._clock("sums", result.constant, {})
        self.add("output", self.nir.Output({"output": np.array(result.constant.shape)}), "sums")
        return self.nir.NIRGraph(self.nodes, self.edges), result.arrival + self.spiking.time_steps

    def _signal(self, node: Any, inputs: list[_Signal]) -> _Signal:
        attributes = {a.name: a.s.decode() if a.type == 3 else a.f for a in node.attribute if a.type in (1, 3)}
        if node.domain:
            layer = self.layers[attributes["layer"]]
            (x,) = inputs
            if isinstance(layer, DelayedNeuron):
                return self._neuron(layer, x, attributes["threshold"])
            if isinstance(layer, SpikingMaxPool):
                return self._max_pool(layer, x)
            return self._chain(layer, x) if isinstance(layer, SpikingChain) else self._dense(layer, x)
        if node.op_type == "Add" and len(inputs) == 2 and inputs[0].constant.shape == inputs[1].constant.shape:
            left, right = inputs
            arrival = max(left.arrival, right.arrival)
            return _Signal(left.nodes + right.nodes, left.constant + right.constant, left.bound + right.bound, arrival)
        if node.op_type == "ReduceMean" and len(inputs) == 1 and inputs[0].constant.dim() == 3:
            return self._mean(node.output[0], inputs[0])
        if len(inputs) == 1 and (node.op_type in _NONE or (node.op_type in _VECTOR and inputs[0].constant.dim() == 1)):
            return inputs[0]
        behind = sorted({name.removesuffix(".merged") for signal in inputs for name in signal.nodes})
        raise QsdError(f"NIR cannot express the operation {node.op_type} behind {', '.join(behind)}; {_INSTEAD}")

    def _chain(self, chain: SpikingChain, x: _Signal) -> _Signal:
        factors = {"merged": chain.merged} if chain.merged is not None else chain.convolutions
        constant, bound, nodes = torch.zeros_like(x.constant), x.bound, x.nodes
        share = 1.0 if x.binary else 1 / self.spiking.time_steps  # an image is there in every step
        for i, (key, factor) in enumerate(factors.items()):
            weight = factor.weight.detach().cpu().float()
            padding = factor.padding + (factor.frame is not None)  # only pointwise convolutions have a frame
            # nir 1.0 refuses to read grouped convolutions: their weights are filled up with zeros.
            dense = _without_groups(weight, factor.groups) * (1.0 if i else share)
            convolution = self.nir.Conv2d(
                tuple(constant.shape[1:]),
                dense.numpy(),
                factor.stride,
                padding,
                1,
                1,
                np.zeros(len(weight), np.float32),
            )
            nodes = self.add(f"{chain.name}.{key}", convolution, *nodes)
            constant = _evaluate(factor, constant)
            bound *= float(weight.abs().flatten(1).sum(1).max())
        return _Signal(nodes, constant, bound + float(constant.abs().max()), x.arrival)

    def _dense(self, dense: SpikingDense, x: _Signal) -> _Signal:
        weight, nodes = dense.weight.detach().cpu().float(), x.nodes
        nodes = self.add(dense.name, self.nir.Linear(weight.numpy()), *nodes)
        bias = dense.bias.detach().cpu().float()
        bound = x.bound * float(weight.abs().sum(1).max())
        return _Signal(nodes, bias, bound + float(bias.abs().max()), x.arrival)

    def _mean(self, name: str, x: _Signal) -> _Signal:
        _, height, width = x.constant.shape
        size = np.array([height, width])
        nodes = self.add(f"mean.{name}", self.nir.AvgPool2d(size, size, np.array([0, 0])), *x.nodes)
        pooled = {"input": np.array([len(x.constant), 1, 1])}
        nodes = self.add(f"vector.{name}", self.nir.Flatten(pooled, 0, -1), *nodes)
        return _Signal(nodes, x.constant.mean((1, 2)), x.bound, x.arrival, x.binary)

    def _max_pool(self, layer: SpikingMaxPool, x: _Signal) -> _Signal:
        if not x.binary:
            raise QsdError(f"max-pool {layer.name} pools no spikes, and NIR has no other one.")
        kernel, stride, padding, dilation = (
            np.array([v, v] if isinstance(v, int) else list(v))
            for v in (layer.pool.kernel_size, layer.pool.stride, layer.pool.padding, layer.pool.dilation)
        )
        if (dilation > 1).any() or layer.pool.ceil_mode:
            raise QsdError(f"max-pool {layer.name} is dilated or rounds its size up, which NIR's pools do not.")
        nodes = self.add(f"{layer.name}.sum", self.nir.SumPool2d(kernel, stride, padding), *x.nodes)
        constant = layer.pool(x.constant.unsqueeze(0))[0]
        # Spikes of the lossless delay have no gaps, so that the largest count fires whenever any of them does.
        nodes = self.add(layer.name, self.nir.Threshold(np.full(tuple(constant.shape), 0.5, np.float32)), *nodes)
        return _Signal(nodes, constant, x.bound, x.arrival, True)

    def _neuron(self, neuron: DelayedNeuron, x: _Signal, threshold: float) -> _Signal:
        steps, shape = self.spiking.time_steps, tuple(x.constant.shape)
        below = np.nextafter(np.float32(threshold), np.float32(0))  # NIR fires above a threshold, not at it
        self.add(neuron.name, self.nir.IF(np.ones(shape, np.float32), np.full(shape, below)), *x.nodes)
        opens = x.arrival + neuron.delay
        closed = 2.0 ** math.ceil(math.log2(x.bound + (steps + 1) * threshold))
        pulses = {1: -closed, opens + 1: closed, opens + steps + 1: -closed}
        self._clock(neuron.name, x.constant + threshold / 2, pulses)
        return _Signal((neuron.name,), torch.zeros(shape), float(steps), opens, True)

    def _clock(self, name: str, start: Tensor, pulses: Mapping[int, float]) -> None:
        """An input that adds ``start`` in the first step, and the same pulse to all neurons in others."""
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
        self.edges.append((f"{clock}.spread", name))
        self.clocks[clock] = {
            "pulses": {str(step): value for step, value in pulses.items()},
            "start": labels.reshape(size).tolist() if size else 0,
        }


def _evaluate(factor: Any, constant: Tensor) -> Tensor:
    """What a convolution makes of a constant input, its bias and frame included."""
    return factor(constant.unsqueeze(0).to(factor.weight))[0].cpu().float()


def _without_groups(weight: Tensor, groups: int) -> Tensor:
    """The weights ``[C_out, C_in, k, k]`` of an equal convolution with one group."""
    if groups == 1:
        return weight
    blocks = weight.unflatten(0, (groups, -1))
    dense = blocks.new_zeros(groups, blocks.shape[1], groups, *blocks.shape[2:])
    for group in range(groups):
        dense[group, :, group] = blocks[group]
    return dense.flatten(2, 3).flatten(0, 1)


def _refuse_products(graph: Any) -> None:
    """Name the neurons whose spikes are multiplied by each other, before anything else that is in the way."""
    heard: dict[str, str] = {}
    for node in graph.node:
        inputs = [heard[name] for name in node.input if name in heard]
        if node.domain:
            own = next(a.s.decode() for a in node.attribute if a.name == "layer")
            heard[node.output[0]] = own
        elif len(inputs) == 2 and "MatMul" in node.op_type:
            raise QsdError(f"NIR has no product of two activations, such as {' and '.join(inputs)}; {_INSTEAD}")
        elif inputs:
            heard[node.output[0]] = inputs[0]


def to_nir(
    spiking: SpikingNetwork,
    path: str | Path,
    largest_pixel: float = 8.0,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a converted network as a NIR graph (HDF5) with a schedule beside it (JSON).

    Every step evaluates all nodes in order. Feed the image in the first T steps and nothing afterwards, and each input
    ``clock.NEURON`` as the schedule says: its channel 0 gets the pulses, ``{step: value}``, everywhere; in step 1, its
    channel ``1 + k`` gets a 1 wherever ``start`` is k. After ``steps`` steps the membrane of ``sums`` holds the logits.
    The neurons must reset by subtraction of their threshold and let membranes become negative; NIR cannot say so, and
    backends differ. Early currents of residual connections charge a neuron at once, which changes no count, since
    delays are lossless.

    Args:
        spiking: with lossless delays, and without products of activations: attention is refused, since NIR has no node
            for it. Parts of a network can be converted and written one by one.
        path: file to write, ``.nir``; the schedule gets its name with ``.json`` appended.
        largest_pixel: no normalised pixel is larger; closed windows are kept closed up to that.
        notes: further facts to keep in the schedule, as JSON.

    Returns:
        The path of the schedule.

    Raises:
        QsdError: if the package ``nir`` is missing, for what NIR cannot express, and if a file cannot be written.
    """
    path = Path(path)
    try:
        import nir
    except ImportError as error:
        raise QsdError("writing NIR files needs more packages: pip install 'qsd[export]'.") from error
    check_target(spiking, path)
    writer = _Writer(spiking, spiking.example, largest_pixel)
    graph, length = writer.write()
    schedule = {"time_steps": spiking.time_steps, "steps": length, "clocks": writer.clocks, "notes": dict(notes or {})}
    plan = path.with_name(f"{path.name}.json")
    with replacing(path) as partial, replacing(plan) as partial_plan:
        nir.write(partial, graph)
        partial_plan.write_text(json.dumps(schedule))
    return plan
