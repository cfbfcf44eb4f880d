"""The layers of a converted network: neurons, synapses, products and pools."""

from qsd.spiking.layers.base import Role, TimedLayer, missing_parts
from qsd.spiking.layers.convolution import Convolution
from qsd.spiking.layers.costs import LayerInputs, Operations, both, synaptic_operations
from qsd.spiking.layers.frames import SpikingEvents, SpikingFrameAxis, SpikingFrameMean
from qsd.spiking.layers.geometry import Geometry, dense_macs, fan_out
from qsd.spiking.layers.neuron import DelayedNeuron, HalfEvenNeuron
from qsd.spiking.layers.pooling import SpikingMaxPool
from qsd.spiking.layers.products import SpikingProduct, SpikingQuery
from qsd.spiking.layers.synapses import SpikingChain, SpikingDense, SpikingLinear, SpikingPooledDense

__all__ = [
    "Convolution",
    "DelayedNeuron",
    "Geometry",
    "HalfEvenNeuron",
    "LayerInputs",
    "Operations",
    "Role",
    "SpikingChain",
    "SpikingDense",
    "SpikingEvents",
    "SpikingFrameAxis",
    "SpikingFrameMean",
    "SpikingLinear",
    "SpikingMaxPool",
    "SpikingPooledDense",
    "SpikingProduct",
    "SpikingQuery",
    "TimedLayer",
    "both",
    "dense_macs",
    "fan_out",
    "missing_parts",
    "synaptic_operations",
]
