"""Bits that products of two trains of spikes move, see `qsd.spiking.layers.movement`.

Where a synapse fetches weights, a product fetches entries of its other operand; they are counted as weights.
"""

import math

from qsd.spiking.layers.costs import LayerInputs, Operations
from qsd.spiking.layers.linear_movement import QUEUE_WORDS
from qsd.spiking.layers.movement import (
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


def product_movement(inputs: LayerInputs, operations: Operations) -> Movement:
    """Product of two trains of spikes by temporal decomposition.

    Each spike raises a running sum of its own operand, fetches a row of the running sums of the other operand, and adds
    it to the output. A network of numbers fetches a row of its right operand for each value of the left one.

    Args:
        inputs: Inputs of the call, ``[..., I, C]`` and ``[..., C, J]``.
        operations: Operations of the call.
    """
    left, right = inputs.tensors
    images, sizes = inputs.images, [inputs.size(x) for x in inputs.tensors]
    spikes = [float(inputs.spike_sum(x)) for x in inputs.tensors]
    output, outputs = _output(inputs), sizes[0] * right.shape[-1] / left.shape[-1]
    traffic: dict[Network, Traffic] = {}
    for network in NETWORKS:
        # Operands may be counts with a width of their own, and M of an attention is one.
        first, second = (inputs.signal(i).bits(network) for i in range(2))
        sums = output.bits(network)
        held = sizes[0] * first + sizes[1] * second + outputs * sums
        if network in ("merged", "unmerged"):
            additions, passes = operations.additions[network], images * inputs.window
            by_left = spikes[0] * right.shape[-1]
            raised = spikes[0] * first + spikes[1] * second
            running, charged = sizes[0] * first + sizes[1] * second, outputs * sums
            events = Moved(
                by_left * second + (additions - by_left) * first,
                additions * sums + raised,
                (additions + images * outputs) * sums + raised,
                sum(count * address_bits(size) for count, size in zip(spikes, sizes)),
            )
            moved = passes * (running + charged)
            reuse = Moved(0.0, moved, moved, passes * sum(sizes))
            held += sum(sizes)
        else:
            events, reuse = _numbers(inputs, operations, network, (first, second), sizes, outputs, sums)
        silent = Moved(membranes_written=images * outputs * sums)
        traffic[network] = Traffic(held, events, reuse, silent)
    return Movement(same_parts(traffic), output, _words(spikes, operations, sizes[0] + sizes[1], outputs))


def query_movement(inputs: LayerInputs, operations: Operations) -> Movement:
    """Product of a complete integer matrix and a train of spikes, each of which adds a column of the matrix.

    Args:
        inputs: Inputs of the call, the matrix ``[..., I, C]`` and the spikes ``[..., C, J]``.
        operations: Operations of the call.
    """
    matrix = inputs.tensors[0]
    images, sizes = inputs.images, [inputs.size(x) for x in inputs.tensors]
    output, outputs = _output(inputs), sizes[1] * matrix.shape[-2] / matrix.shape[-1]
    traffic: dict[Network, Traffic] = {}
    for network in NETWORKS:
        first, second = (inputs.signal(i).bits(network) for i in range(2))
        sums = output.bits(network)
        held = sizes[0] * first + outputs * sums
        if network in ("merged", "unmerged"):
            additions, passes = operations.additions[network], images * inputs.window
            events = Moved(
                additions * first,
                additions * sums,
                (additions + images * outputs) * sums,
                operations.spikes * address_bits(sizes[1]),
            )
            charged = passes * outputs * sums
            reuse = Moved(passes * sizes[0] * first, charged, charged, passes * sizes[1])
            held += sizes[1]
        else:
            swapped = (second, first), sizes[::-1]
            events, reuse = _numbers(inputs, operations, network, *swapped, outputs, sums)
            held += sizes[1] * second
        silent = Moved(membranes_written=images * outputs * sums)
        traffic[network] = Traffic(held, events, reuse, silent)
    return Movement(same_parts(traffic), output, _words([operations.spikes], operations, sizes[0], outputs))


def _output(inputs: LayerInputs) -> Signal:
    """Range of the sums of ``C`` products."""
    left, right = (inputs.signal(i) for i in range(2))
    terms = inputs.tensors[0].shape[-1]
    merged, unmerged = terms * left.merged * right.merged, terms * left.unmerged * right.unmerged
    return Signal(merged, unmerged, left.signed or right.signed)


def _numbers(
    inputs: LayerInputs,
    operations: Operations,
    network: Network,
    bits: tuple[int, int],
    sizes: list[float],
    outputs: float,
    sums: int,
) -> tuple[Moved, Moved]:
    """A product of numbers: each event of the first operand meets a row of the second one."""
    images = inputs.images
    first, second = bits
    macs, read = operations.dense, images * sizes[0]
    if network == "integer" and operations.effective is not None and operations.nonzero is not None:
        macs, read = operations.effective, operations.nonzero
    written = (macs + images * outputs) * sums
    events = Moved(macs * second, macs * sums, written, read * (address_bits(sizes[0]) + first))
    reuse = Moved(images * sizes[1] * second, 0.0, images * outputs * sums, images * sizes[0] * first)
    return events, reuse


def _words(spikes: list[float], operations: Operations, fetched: float, outputs: float) -> Words:
    """The model of Lemaire et al., whose paper has no attention: like synapses of a fully connected layer."""
    additions, words = operations.additions["merged"], Words()
    words.additions = words.addressing_additions = additions
    words.access(sum(spikes), QUEUE_WORDS)
    words.access(additions, math.ceil(fetched))
    words.access(2 * additions, outputs)
    return words
