"""Bits that neurons and pools move, and means of numbers, see `qsd.spiking.layers.movement`."""

from torch import Tensor

from qsd.spiking.layers.costs import LayerInputs
from qsd.spiking.layers.linear_movement import QUEUE_WORDS
from qsd.spiking.layers.movement import (
    FLOAT_BITS,
    NETWORKS,
    Moved,
    Movement,
    Network,
    Signal,
    Traffic,
    Words,
    address_bits,
    same_parts,
)


def value_bits(network: Network, signal: Signal) -> int:
    """Bits of one activation, of which only a network of numbers has more than its address.

    Args:
        network: The network.
        signal: The spike counts.
    """
    return 0 if network in ("merged", "unmerged") else signal.bits(network)


def neuron_movement(inputs: LayerInputs, output: Tensor, call: str) -> Movement:
    """What a layer of neurons moves; the charge of their membranes belongs to the synapses in front.

    In each firing step of its window a neuron compares its membrane with the threshold, and a spike lowers it. The
    neuron of a network of numbers reads its sum once and writes one number.

    Args:
        inputs: Inputs of the call.
        output: Spike counts, or spikes by time step.
        call: Name of the call.
    """
    images, size, signal = inputs.images, inputs.size(output), inputs.signal()
    counts = Signal(inputs.time_steps, inputs.time_steps, signed=False, sources=(call,))
    spikes = float(inputs.spike_sum(output))
    nonzero = float(inputs.nonzero_sum(output))
    neurons, firings = images * size, images * size * inputs.window
    traffic: dict[Network, Traffic] = {}
    for network in NETWORKS:
        membrane, value = signal.bits(network), value_bits(network, counts)
        event = address_bits(size) + value
        if value == 0:
            events = Moved(0.0, firings * membrane, spikes * membrane, 0.0, spikes * event)
            reuse = Moved(0.0, firings * membrane, firings * membrane, 0.0, firings)
            silent = Moved(0.0, firings * membrane)
        else:
            written = neurons if network == "float_twin" else nonzero
            silent = Moved(0.0, neurons * membrane)
            events = Moved(0.0, neurons * membrane, 0.0, 0.0, written * event)
            reuse = Moved(0.0, neurons * membrane, 0.0, 0.0, neurons * value)
        traffic[network] = Traffic(size * (membrane + max(1, value)), events, reuse, silent)
    words = Words(additions=spikes)
    words.access(2 * firings, size)
    words.access(spikes, QUEUE_WORDS)
    return Movement(same_parts(traffic), counts, words)


def pool_movement(inputs: LayerInputs, output: Tensor, call: str, sums: bool) -> Movement:
    """What a max-pool moves: its input and its output, and running sums where spike trains may have gaps.

    Args:
        inputs: Inputs of the call.
        output: Spike counts, or spikes by time step.
        call: Name of the call.
        sums: Whether running sums are kept.
    """
    (x,), images, signal = inputs.tensors, inputs.images, inputs.signal()
    size, pooled = inputs.size(x), inputs.size(output)
    spikes = [float(inputs.spike_sum(y)) for y in (x, output)]
    nonzero = [float(inputs.nonzero_sum(y)) for y in (x, output)]
    steps, held = images * inputs.window, signal.bits("integer")
    traffic: dict[Network, Traffic] = {}
    for network in NETWORKS:
        value = signal.bits(network) if inputs.image else value_bits(network, signal)
        into, out = address_bits(size) + value, address_bits(pooled) + value
        if value == 0:
            state = held if sums else 0
            raised, kept = spikes[0] * state, steps * size * state
            events = Moved(0.0, raised, raised, spikes[0] * into, spikes[1] * out)
            reuse = Moved(0.0, kept, kept, steps * size, steps * pooled)
        else:
            read, written = (images * size, images * pooled) if network == "float_twin" else nonzero
            state, events = 0, Moved(0.0, 0.0, 0.0, read * into, written * out)
            reuse = Moved(0.0, 0.0, 0.0, images * size * value, images * pooled * value)
        traffic[network] = Traffic((size + pooled) * max(1, value) + size * state, events, reuse, Moved())
    output_signal = Signal(signal.merged, signal.unmerged, signal.signed, (*signal.sources, call))
    return Movement(same_parts(traffic), output_signal)


def mean_movement(inputs: LayerInputs, x: Tensor, outputs: float) -> Movement:
    """What sums of numbers over positions move, in the networks of numbers.

    Args:
        inputs: Inputs of the call; their signal is that of the sums.
        x: Spike counts, or spikes by time step.
        outputs: Sums per image.
    """
    images, size, signal = inputs.images, inputs.size(x), inputs.signal()
    counts = Signal(inputs.time_steps, inputs.time_steps, signed=False)
    nonzero = float(inputs.nonzero_sum(x))
    traffic: dict[Network, Traffic] = {}
    for network in ("integer", "float_twin"):
        sums = FLOAT_BITS if network == "float_twin" else signal.times(size / outputs).bits(network)
        value = counts.bits(network)
        read = images * size if network == "float_twin" else nonzero
        events = Moved(0.0, read * sums, read * sums, read * (address_bits(size) + value))
        reuse = Moved(0.0, 0.0, images * outputs * sums, images * size * value)
        traffic[network] = Traffic(size * value + outputs * sums, events, reuse, Moved())
    return Movement(same_parts(traffic), counts)
