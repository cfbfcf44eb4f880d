"""Bits that synapses move: linear maps whose first factor sees spikes, see `qsd.spiking.layers.movement`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qsd.spiking.layers.costs import LayerInputs, Operations
from qsd.spiking.layers.geometry import Geometry
from qsd.spiking.layers.movement import (
    FLOAT_BITS,
    Moved,
    Movement,
    Network,
    Signal,
    Traffic,
    Words,
    address_bits,
    bits_for,
)

QUEUE_WORDS = 1000.0  # messages that the queues of spikes hold in the experiments of Lemaire et al.


@dataclass(frozen=True)
class Factor:
    """One linear map as it lies in memory, with its numbers per image.

    Attributes:
        inputs: Values that come in.
        outputs: Sums that it computes.
        macs: Multiply-accumulates for numbers, positions in the padding included.
        width: Bits of a weight; 0 if the weights are wired.
        weights: Number of weights.
        channels: Number of biases.
        vectors: Scales, biases and the like by output channel that are stored.
        fan_out: Weights that meet one value, borders aside.
        reach: Outputs that one value reaches, borders aside.
        addresses: Addresses that are computed once per pass, on a map; 0 if there is no map.
    """

    inputs: float
    outputs: float
    macs: float
    width: int
    weights: float
    channels: float
    vectors: int
    fan_out: float
    reach: float
    addresses: float = 0.0

    @classmethod
    def of_convolution(
        cls, geometry: Geometry, height: int, width: int, weight_bits: int, vectors: int = 2
    ) -> "Factor":
        """A convolution.

        Args:
            geometry: Its shape.
            height: Height of the input.
            width: Width of the input.
            weight_bits: Bits of a weight.
            vectors: See `Factor`.
        """
        rows, columns = geometry.size(height, width)
        weights = float(geometry.channels * geometry.inputs * geometry.taps)
        by_input = geometry.channels / geometry.groups
        return cls(
            inputs=float(geometry.inputs * geometry.groups * height * width),
            outputs=float(geometry.channels * (rows + 2 * geometry.frame) * (columns + 2 * geometry.frame)),
            macs=weights * rows * columns,
            width=weight_bits,
            weights=weights,
            channels=float(geometry.channels),
            vectors=vectors,
            fan_out=by_input * geometry.taps,
            reach=by_input * math.prod(math.ceil(side.kernel / side.stride) for side in geometry.sides),
            addresses=float(geometry.channels * geometry.taps),
        )

    @property
    def stored(self) -> float:
        """Bits of weights, scales and biases."""
        return self.weights * self.width + FLOAT_BITS * self.vectors * self.channels

    def peak(self, peak: float) -> float:
        """Largest magnitude of an output, in units of the smallest step.

        Args:
            peak: Largest magnitude of an input.
        """
        fan_in = self.macs / self.outputs if self.outputs else 0.0
        if self.channels:
            fan_in = self.weights / self.channels
        return math.inf if self.width >= FLOAT_BITS else max(1.0, fan_in) * peak * 2.0 ** max(0, self.width - 1)


def linear_movement(
    inputs: LayerInputs, operations: Operations, forms: Mapping[str, Sequence[Factor]], words: Words | None = None
) -> Movement:
    """What a linear map moves.

    Args:
        inputs: Inputs of the call.
        operations: Operations of the call.
        forms: Its factors in the ``"merged"`` and the ``"unmerged"`` network; in both the first one sees the inputs.
        words: The call in the model of Lemaire et al.; ``None`` for a map of weights.
    """
    signal, parts = inputs.signal(), {}
    peaks = {"merged": signal.merged, "unmerged": signal.unmerged}
    networks: tuple[tuple[Network, str], ...] = (
        ("merged", "merged"), ("unmerged", "unmerged"), ("integer", "unmerged"), ("float_twin", "unmerged"),
    )  # fmt: skip
    for network, form in networks:
        parts[network], peak = _parts(inputs, operations, network, forms[form], peaks[form])
        if network == form:
            peaks[f"{form} output"] = peak
    output = Signal(peaks["merged output"], peaks["unmerged output"])
    return Movement(parts, output, words or _words(inputs, operations, forms["merged"]))


def _parts(
    inputs: LayerInputs, operations: Operations, network: Network, factors: Sequence[Factor], peak: float
) -> tuple[list[Traffic], float]:
    """Traffic of all factors in one network, and the largest magnitude of the output."""
    spiking = network in ("merged", "unmerged")
    signed, images, parts = inputs.signal().signed, inputs.images, []
    value = FLOAT_BITS if network == "float_twin" else bits_for(peak, signed)
    for i, factor in enumerate(factors):
        peak = math.inf if network == "float_twin" else factor.peak(peak)
        sums = bits_for(peak, True)
        if spiking and i == 0 and not (inputs.image or inputs.analog):
            parts.append(_of_spikes(inputs, operations, factor, operations.additions[network], sums))
        else:
            events, macs = images * factor.inputs, images * factor.macs
            if i == 0 and network == "integer" and operations.nonzero is not None:
                inner = images * sum(later.macs for later in factors[1:])
                effective = operations.dense if operations.effective is None else operations.effective
                events, macs = operations.nonzero, effective - inner
            part = _of_numbers(images, factor, events, macs, value, sums, network == "float_twin")
            if i == 0 and network == "integer" and operations.effective is not None:
                outputs = images * factor.outputs
                part.silent = Moved(weights_read=outputs * _bias_bits(factor), membranes_written=outputs * sums)
            parts.append(part)
        value = sums
    if spiking and inputs.image:
        parts.append(_injected(inputs, factors[-1].outputs, value))
    return parts, peak


def _of_spikes(inputs: LayerInputs, operations: Operations, factor: Factor, additions: float, sums: int) -> Traffic:
    outputs, passes = inputs.images * factor.outputs, inputs.images * inputs.window
    events = Moved(
        weights_read=additions * factor.width + outputs * _bias_bits(factor),
        membranes_read=additions * sums,
        membranes_written=(additions + outputs) * sums,  # They begin with the bias.
        activations_read=operations.spikes * address_bits(factor.inputs),
    )
    charged = passes * factor.outputs * sums
    reuse = Moved(passes * factor.stored, charged, charged, passes * factor.inputs)
    silent = Moved(weights_read=outputs * _bias_bits(factor), membranes_written=outputs * sums)
    return Traffic(factor.stored + factor.outputs * sums + factor.inputs, events, reuse, silent)


def _of_numbers(
    images: float, factor: Factor, events: float, macs: float, value: int, sums: int, floats: bool
) -> Traffic:
    """A factor whose inputs are numbers of ``value`` bits, computed once per image."""
    width = FLOAT_BITS if floats and factor.width else factor.width
    stored = FLOAT_BITS * (factor.weights + factor.channels) if floats else factor.stored
    outputs = images * factor.outputs
    by_event = Moved(
        weights_read=macs * width + outputs * _bias_bits(factor),
        membranes_read=macs * sums,
        membranes_written=(macs + outputs) * sums,
        activations_read=events * (address_bits(factor.inputs) + value),
    )
    # Sums are accumulated where they are computed, and written once.
    reuse = Moved(images * stored, 0.0, outputs * sums, images * factor.inputs * value)
    return Traffic(stored + factor.outputs * sums + factor.inputs * value, by_event, reuse)


def _injected(inputs: LayerInputs, outputs: float, sums: int) -> Traffic:
    """The current of an image, which charges the membranes in every time step that a constant current comes in."""
    injections = sum(inputs.code.share(step) > 0 for step in range(1, inputs.window + 1))
    bits = inputs.images * injections * outputs * sums
    events, reuse = (Moved(membranes_read=2 * bits, membranes_written=bits) for _ in range(2))  # Current and membrane.
    return Traffic(2 * outputs * sums, events, reuse)


def _bias_bits(factor: Factor) -> int:
    return FLOAT_BITS if factor.channels else 0


def _words(inputs: LayerInputs, operations: Operations, factors: Sequence[Factor]) -> Words:
    """The merged kernel in the model of Lemaire et al. (2022)."""
    (factor, *_), words, spikes = factors, Words(), operations.spikes
    capacity = factor.weights + factor.channels
    if inputs.image or inputs.analog:
        images = inputs.images
        macs = images * factor.macs
        words.macs, words.additions = macs, images * factor.outputs
        words.addressing_additions = images * (factor.inputs + factor.outputs + factor.addresses)
        words.access(macs if factor.addresses else images * factor.inputs, factor.inputs)
        words.access(macs + images * factor.outputs, capacity)
        return words
    biases = inputs.images * inputs.window * factor.outputs if factor.channels else 0.0
    words.additions = spikes * factor.reach + biases
    words.addressing_additions = spikes * factor.fan_out
    words.addressing_macs = 2 * spikes if factor.addresses else 0.0
    words.access(spikes, QUEUE_WORDS)
    words.access(spikes * factor.fan_out + biases, capacity)
    words.access(2 * spikes * factor.fan_out, factor.outputs)
    return words


def default_movement(inputs: LayerInputs, operations: Operations, outputs: float, stored: float) -> Movement:
    """What a layer moves that tells its operations and its stored bits alone.

    Args:
        inputs: Inputs of the call.
        operations: Operations of the call.
        outputs: Values of the output per image.
        stored: Bits that the layer stores; weights are taken for floats, and for wires if there are none.
    """
    size = inputs.size(inputs.tensors[0])
    macs = operations.dense / inputs.images
    by_input = macs / size if size else 0.0
    weights = stored / FLOAT_BITS
    factor = Factor(size, outputs, macs, FLOAT_BITS if stored else 0, weights, 0.0, 0, by_input, by_input)
    return linear_movement(inputs, operations, {"merged": [factor], "unmerged": [factor]})
