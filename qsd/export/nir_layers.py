"""The writers of the engine's layers for NIR graphs."""

import math

import numpy as np
import torch

from qsd.errors import QsdError
from qsd.export.graph import LayerCall
from qsd.export.nir_graph import NirGraph, Signal, writes_nir
from qsd.spiking.layers import (
    DelayedNeuron,
    HalfEvenNeuron,
    SpikingChain,
    SpikingDense,
    SpikingMaxPool,
    SpikingPooledDense,
    SpikingProduct,
    SpikingQuery,
)
from qsd.spiking.merging import dense_kernel

# NIR has no products: they are found in the traced graph and refused by the names of the neurons.
writes_nir.leave_to_torch(SpikingProduct, SpikingQuery)


@writes_nir(DelayedNeuron)
def _neuron(neuron: DelayedNeuron, call: LayerCall, graph: NirGraph) -> Signal:
    if neuron.memory is not None:
        raise QsdError(f"neuron {neuron.name} keeps its membrane from frame to frame, which NIR graphs do not hold.")
    x, threshold, steps = graph.signal(call.inputs[0]), call.threshold, neuron.time_steps
    shape = tuple(x.constant.shape)
    below = np.nextafter(np.float32(threshold), np.float32(0))  # NIR fires above a threshold, not at it.
    graph.add(neuron.name, graph.nir.IF(np.ones(shape, np.float32), np.full(shape, below)), *x.nodes)
    opens = x.arrival + neuron.delay
    # A membrane this far below zero stays below the threshold, for every input within the bound.
    closed = 2.0 ** math.ceil(math.log2(x.bound + (steps + 1) * threshold))
    pulses = {1: -closed, opens + 1: closed, opens + steps + 1: -closed}
    graph.add_clock(neuron.name, x.constant + threshold / 2, pulses)
    return Signal((neuron.name,), torch.zeros(shape), float(steps), opens, True)


@writes_nir(HalfEvenNeuron)
def _half_even_neuron(neuron: HalfEvenNeuron, call: LayerCall, graph: NirGraph) -> Signal:
    del call, graph
    raise QsdError(
        f"neuron {neuron.name} rounds halves to even counts, and NIR has no neuron that does; build the network with "
        "rounding='half_up', which gives other counts for exact ties alone."
    )


@writes_nir(SpikingChain)
def _chain(chain: SpikingChain, call: LayerCall, graph: NirGraph) -> Signal:
    x = graph.signal(call.inputs[0])
    factors = {"merged": chain.merged} if chain.merged is not None else chain.convolutions
    constant, bound, nodes = torch.zeros_like(x.constant), x.bound, x.nodes
    share = 1.0 if x.binary else 1 / graph.spiking.time_steps  # An image is there in every step.
    for i, (key, factor) in enumerate(factors.items()):
        # nir 1.0 cannot read grouped convolutions, so that their weights are filled up with zeros.
        weight = dense_kernel(factor).cpu().float() * (1.0 if i else share)
        (top, bottom), (left, right) = factor.outer_padding
        if (top, left) != (bottom, right):
            raise QsdError(f"layer {chain.name} is padded on one side only, which NIR cannot express.")
        bias = np.zeros(len(weight), np.float32)  # It goes through the clock.
        size = tuple(constant.shape[1:])
        convolution = graph.nir.Conv2d(size, weight.numpy(), factor.stride, (top, left), factor.dilation, 1, bias)
        nodes = graph.add(f"{chain.name}.{key}", convolution, *nodes)
        constant = factor(constant.unsqueeze(0).to(factor.weight))[0].cpu().float()
        bound *= float(factor.weight.detach().cpu().float().abs().flatten(1).sum(1).max())
    return Signal(nodes, constant, bound + float(constant.abs().max()), x.arrival)


@writes_nir(SpikingDense)
def _dense(layer: SpikingDense, call: LayerCall, graph: NirGraph) -> Signal:
    return _add_dense(layer, graph.signal(call.inputs[0]), graph)


@writes_nir(SpikingPooledDense)
def _pooled_dense(layer: SpikingPooledDense, call: LayerCall, graph: NirGraph) -> Signal:
    return _add_dense(layer, graph.add_mean(layer.name, graph.signal(call.inputs[0])), graph)


def _add_dense(layer: SpikingDense, x: Signal, graph: NirGraph) -> Signal:
    weight, bias = layer.weight.detach().cpu().float(), layer.bias.detach().cpu().float()
    nodes = graph.add(layer.name, graph.nir.Linear(weight.numpy()), *x.nodes)
    bound = x.bound * float(weight.abs().sum(1).max())
    return Signal(nodes, bias, bound + float(bias.abs().max()), x.arrival)


@writes_nir(SpikingMaxPool)
def _max_pool(layer: SpikingMaxPool, call: LayerCall, graph: NirGraph) -> Signal:
    x = graph.signal(call.inputs[0])
    if not x.binary:
        raise QsdError(f"max-pool {layer.name} pools no spikes, and NIR has no other max-pool.")
    kernel, stride, padding, dilation = (
        np.array([value, value] if isinstance(value, int) else list(value))
        for value in (layer.pool.kernel_size, layer.pool.stride, layer.pool.padding, layer.pool.dilation)
    )
    if (dilation > 1).any() or layer.pool.ceil_mode:
        raise QsdError(f"max-pool {layer.name} is dilated or rounds its size up, which NIR's pools do not.")
    nodes = graph.add(f"{layer.name}.sum", graph.nir.SumPool2d(kernel, stride, padding), *x.nodes)
    constant = layer.pool(x.constant.unsqueeze(0))[0]
    # Spikes of the lossless delay have no gaps, so that the largest count fires whenever any of them does.
    nodes = graph.add(layer.name, graph.nir.Threshold(np.full(tuple(constant.shape), 0.5, np.float32)), *nodes)
    return Signal(nodes, constant, x.bound, x.arrival, True)
