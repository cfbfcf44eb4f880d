"""Convolutions, chains of them and classifiers as integer layers."""

from dataclasses import replace

import numpy as np

from qsd.errors import QsdError
from qsd.integer import description
from qsd.integer.builder import Builder, converts
from qsd.integer.description import LARGEST_PRODUCT, LARGEST_WEIGHT, LARGEST_WIDTH
from qsd.integer.scaling import Rescaling, Table
from qsd.integer.signals import Floats, Integers, Signal
from qsd.integer.tracing import Call
from qsd.integer.weights import TrainedIntegers, evaluated_convolutions, weight_name
from qsd.spiking import SpikingNetwork
from qsd.spiking.layers import Convolution, SpikingChain, SpikingDense, SpikingPooledDense
from qsd.spiking.layers.geometry import Geometry, Pair

_ONE: Pair = (1, 1)
_TINY = 1e-30  # In place of a range of zero.


@converts(SpikingChain)
def _chain(call: Call, signals: list[Signal], builder: Builder) -> Signal:
    """A chain of convolutions.

    Where its output enters a running sum, a single convolution reads its weights from a table in the unit of the sum. A
    chain that ends with another convolution is rescaled: its values are multiplied.
    """
    chain: SpikingChain = call.layer
    (signal,) = signals
    _check_input(chain.name, signal)
    factors = evaluated_convolutions(chain)
    unit, frame = builder.streams.units.get(call.output), 0
    for number, (key, factor) in enumerate(factors.items()):
        last = number == len(factors) - 1
        name = chain.name if last else f"{chain.name}.{key}"
        trained = TrainedIntegers.of(factor, weight_name(chain, key, builder.spiking), chain.name, builder.spiking)
        if number and not _depthwise(factor.geometry, signal) and np.ptp(signal.unit):
            signal = _common_unit(signal, trained, builder)
        geometry = _framed(factor, frame, signal, name)
        if number and last and unit is not None:
            signal = convolved(f"{name}.sum", geometry, trained, signal, None, builder)
            signal = rescaled(name, signal, unit, builder)
        else:
            signal = convolved(name, geometry, trained, signal, unit if last else None, builder)
        frame = 1 if trained.framed else 0
    if frame:
        raise QsdError(f"layer {chain.name} ends with a frame, which an integer network cannot put around its sums.")
    return signal


def first_scale(call: Call, spiking: SpikingNetwork, image_unit: Floats) -> Floats | None:
    """The value of one unit of a convolution's integer sums by channel; ``None`` for other calls and for chains.

    Args:
        call: A call of the traced network.
        spiking: The network.
        image_unit: Value of one unit of the image.
    """
    if type(call.layer) is not SpikingChain or len(factors := evaluated_convolutions(call.layer)) > 1:
        return None
    (key, factor), chain = next(iter(factors.items())), call.layer
    trained = TrainedIntegers.of(factor, weight_name(chain, key, spiking), chain.name, spiking)
    return trained.scale * (image_unit if call.inputs == (0,) else 1.0)


def _framed(factor: Convolution, frame: int, signal: Signal, name: str) -> Geometry:
    """The shape of a convolution whose input has a frame of its response to zeros, which is a border of zero sums."""
    (top, bottom), (left, right) = factor.padding
    if any((top, bottom, left, right)) and signal.offset.any() and signal.content != "image":
        raise QsdError(
            f"layer {name} sees a border of zeros beside values with a bias, which is no integer; convert the network "
            "with merged_bits, or put a norm with a frame before the layer."
        )
    around = ((top + frame, bottom + frame), (left + frame, right + frame))
    return replace(factor.geometry, padding=around, frame=0)


def _check_input(name: str, signal: Signal) -> None:
    if signal.content not in ("counts", "image"):
        raise QsdError(f"layer {name} sees {signal.content} instead of spikes; put a neuron of ours before it.")


def _depthwise(geometry: Geometry, signal: Signal) -> bool:
    """Whether every output channel sees one input channel, which has its own unit."""
    return geometry.groups == signal.shape[0] == geometry.channels


def _common_unit(signal: Signal, after: TrainedIntegers, builder: Builder) -> Signal:
    """Inner values in one unit for all channels, as wide as allowed and as the sums behind them leave room for."""
    rows = np.abs(after.integers.reshape(len(after.integers), -1)).sum(1)
    room = LARGEST_WIDTH - int(rows.max(initial=1)).bit_length() - 1
    largest = float((np.abs(signal.unit) * np.maximum(-signal.low, signal.high)).max())
    levels = 2.0 ** (min(builder.inner_bits, room) - 1) - 2
    unit = np.full(1, max(largest, _TINY) / max(levels, 1))
    return rescaled(f"{signal.name}.inner", signal, unit, builder)


def rescaled(name: str, signal: Signal, unit: Floats, builder: Builder) -> Signal:
    """A signal in another unit, by a product and two shifts.

    Args:
        name: Name of the new layer.
        signal: The signal.
        unit: The new unit, by channel or one for all.
        builder: The network in construction.
    """
    factor = signal.by_channel(signal.unit / unit)
    low, high = (np.array(signal.by_channel(values)) for values in (signal.low, signal.high))
    numbers = Rescaling.of(factor)
    ends = [numbers.apply(low), numbers.apply(high)]
    products = [numbers.products(low), numbers.products(high)]
    product_bits = builder.check_width(name, int(np.min(products)), int(np.max(products)), LARGEST_PRODUCT)
    new = replace(
        signal,
        name=name,
        low=np.minimum(*ends),
        high=np.maximum(*ends),
        unit=signal.by_channel(unit),
        error=signal.error + unit * numbers.error(factor, low, high),
    )
    builder.add(description.Rescale, new, [signal], shift=numbers.shift, product_bits=product_bits)
    builder.keep(name, "multiplier", numbers.multiplier)
    return new


def convolved(
    name: str, geometry: Geometry, trained: TrainedIntegers, signal: Signal, unit: Floats | None, builder: Builder
) -> Signal:
    """One convolution, with a table of weights in a unit, or with the weights as they are if that is ``None``.

    Args:
        name: Name of the new layer.
        geometry: Shape of the convolution.
        trained: Weights and bias.
        signal: Its input.
        unit: Unit of its output, by channel or one for all.
        builder: The network in construction.
    """
    weight, low, high = trained.integers, signal.by_channel(signal.low), signal.by_channel(signal.high)
    # Of a depthwise convolution every channel has the unit of its input channel.
    inner = signal.by_channel(signal.unit) if _depthwise(geometry, signal) else signal.unit[:1]
    scale, real = trained.scale * inner, _column(trained.scale) * weight
    constant = _by_tap(real, geometry, signal.by_channel(signal.offset))
    table = None if unit is None else Table.of(scale / unit, trained.bits)
    entries = weight if table is None else table.entries(weight)
    scale_out = scale if unit is None else np.broadcast_to(unit, scale.shape)
    # Errors of the entries, and errors of the input that weights pass on. The border of an image lacks the offset.
    misses = np.abs(entries * _column(scale_out) - weight * _column(scale))
    error = _by_tap(misses, geometry, np.maximum(-low, high).astype(np.float64))
    border = np.abs(signal.offset) if signal.content == "image" else 0.0
    passed = _by_tap(np.abs(real), geometry, signal.by_channel(signal.error + border))
    least, most = _range(entries, geometry, low, high)
    new = Signal(
        name,
        (geometry.channels, *geometry.size(*signal.shape[1:])),
        "currents",
        least,
        most,
        scale_out,
        trained.bias + constant.sum((1, 2, 3)),
        (error + passed).sum((1, 2, 3)),
        signal.multiplied,
    )
    return _add(new, signal, geometry, trained, table, builder)


def _column(values: Floats) -> Floats:
    return values.reshape(-1, 1, 1, 1)


def _by_tap(weight: Integers | Floats, geometry: Geometry, values: Integers | Floats) -> Floats:
    """The products of weights ``[C_out, C / groups, k_h, k_w]`` and of a value by input channel."""
    groups = values.reshape(geometry.groups, -1)
    per_output = groups.repeat(geometry.channels // geometry.groups, 0)
    return np.asarray(weight * per_output[:, :, None, None], np.float64)


def _range(entries: Integers, geometry: Geometry, low: Integers, high: Integers) -> tuple[Integers, Integers]:
    """Least and largest sum by output channel. A border of zeros, and a step without spikes, add nothing."""
    ends = [_by_tap(entries, geometry, values) for values in (np.minimum(low, 0), np.maximum(high, 0))]
    least, most = np.minimum(*ends), np.maximum(*ends)
    return least.sum((1, 2, 3)).astype(np.int64), most.sum((1, 2, 3)).astype(np.int64)


def _add(
    new: Signal, signal: Signal, geometry: Geometry, trained: TrainedIntegers, table: Table | None, builder: Builder
) -> Signal:
    name, entry_bits = new.name, trained.bits
    if trained.bits > LARGEST_WEIGHT:
        raise QsdError(f"layer {name} has weights of {trained.bits} bits; integers need merged_bits from 2 to 8.")
    if table is not None:
        largest = table.largest(trained.bits)
        entry_bits = builder.check_width(name, -largest, largest)
        builder.keep(name, "multiplier", table.multiplier)
    builder.keep(name, "weight", trained.integers)
    vertical, horizontal = geometry.sides
    return builder.add(
        description.Convolution,
        new,
        [signal],
        kernel=[vertical.kernel, horizontal.kernel],
        stride=[vertical.stride, horizontal.stride],
        padding=[*vertical.padding, *horizontal.padding],
        dilation=[vertical.dilation, horizontal.dilation],
        groups=geometry.groups,
        weight_bits=trained.bits,
        table_shift=None if table is None else table.shift,
        entry_bits=entry_bits,
    )


@converts(SpikingDense, SpikingPooledDense)
def _dense(call: Call, signals: list[Signal], builder: Builder) -> Signal:
    """A classifier of spikes: a convolution of one pixel, the sum over positions, and a bias in the unit of its sums.

    Positions are summed behind the weights, so that every spike adds weights, and no number of spikes is multiplied.
    """
    layer, (signal,) = call.layer, signals
    _check_input(layer.name, signal)
    trained = TrainedIntegers.of(layer, f"{layer.name}.weight", layer.name, builder.spiking)
    weight = trained.integers[:, :, None, None]
    if len(signal.shape) != 3:
        signal = reshaped(f"{layer.name}.pixel", signal, (weight.shape[1], 1, 1), builder)
    outputs, positions, unit = len(weight), int(np.prod(signal.shape[1:])), builder.streams.units.get(call.output)
    silent = replace(trained, integers=weight, scale=trained.scale / positions, bias=np.zeros(outputs))
    geometry = Geometry(outputs, weight.shape[1], _ONE, _ONE, 0)
    new = convolved(f"{layer.name}.synapses", geometry, silent, signal, unit, builder)
    if unit is None:  # The thresholds of the neuron that follows take the bias.
        return replace(total(layer.name, new, builder), offset=trained.bias)
    bias = np.rint(trained.bias / unit).astype(np.int64)
    summed = total(layer.name, new, builder, bias)
    return replace(summed, error=summed.error + unit / 2)


def total(name: str, signal: Signal, builder: Builder, bias: Integers | None = None) -> Signal:
    """The sum over all positions, and a bias.

    Args:
        name: Name of the new layer.
        signal: A signal ``[C, H, W]``.
        builder: The network in construction.
        bias: Integers by channel that are added, or ``None`` for none.
    """
    positions = int(np.prod(signal.shape[1:]))
    low, high = signal.low * positions, signal.high * positions
    if bias is not None:  # It is added in one of the steps.
        low, high = np.minimum(low, low + bias), np.maximum(high, high + bias)
        builder.keep(name, "bias", bias)
    new = replace(
        signal,
        name=name,
        shape=(signal.shape[0], 1, 1),
        low=low,
        high=high,
        offset=signal.offset * positions,
        error=signal.error * positions,
    )
    return builder.add(description.Total, new, [signal], biased=bias is not None)


def reshaped(name: str, signal: Signal, shape: tuple[int, ...], builder: Builder) -> Signal:
    """The same integers in another shape; channels stay apart where they differ.

    Args:
        name: Name of the new layer.
        signal: The signal.
        shape: The new shape.
        builder: The network in construction.

    Raises:
        QsdError: If channels that differ would be mixed.
    """
    if not signal.uniform and shape[0] != signal.shape[0]:
        raise QsdError(f"layer {name} rearranges channels of different scales; put a neuron before it.")
    arrays = ("low", "high", "unit", "offset", "error")
    one = {key: getattr(signal, key)[:1] for key in arrays} if signal.uniform else {}
    return builder.add(description.Reshape, replace(signal, name=name, shape=shape, **one), [signal])
