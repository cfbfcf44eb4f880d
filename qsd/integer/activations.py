"""Neurons, pools, products and the operations between layers as integer layers."""

from dataclasses import replace
from typing import Any

import numpy as np

from qsd.errors import QsdError
from qsd.integer import description
from qsd.integer.builder import Builder, converts
from qsd.integer.convolutions import reshaped, total
from qsd.integer.margins import Margin
from qsd.integer.signals import Signal
from qsd.integer.thresholds import integer_thresholds
from qsd.integer.tracing import Call
from qsd.spiking.layers import DelayedNeuron, HalfEvenNeuron, SpikingMaxPool, SpikingProduct, SpikingQuery


@converts(DelayedNeuron, HalfEvenNeuron)
def _neuron(call: Call, signals: list[Signal], builder: Builder) -> Signal:
    neuron, (signal,) = call.layer, signals
    if neuron.memory is not None:
        raise QsdError(f"neuron {neuron.name} keeps its membrane from frame to frame, which no integer layer does.")
    if signal.content not in ("currents", "product"):
        raise QsdError(f"neuron {neuron.name} sees {signal.content}; put a convolution of ours before it.")
    if neuron.scaled:
        raise QsdError(
            f"the spikes of neuron {neuron.name} meet an operation that is no layer of qsd, or another neuron, which "
            "would multiply them; put a layer of ours between."
        )
    thresholds, direction = integer_thresholds(neuron, signal, call.arguments)
    low, high = int(signal.low.min()), int(signal.high.max())
    directed = bool((direction < 0).any())
    if directed:  # A membrane is negated before it is compared.
        low, high = min(low, -high), max(high, -low)
    name, steps = neuron.name, builder.time_steps
    membrane_bits = builder.check_width(name, min(low, -1), high)
    # A threshold that is not reached is one more than the largest sum.
    threshold_bits = builder.check_width(name, int(min(thresholds.min(), -1)), int(thresholds.max()))
    builder.keep(name, "thresholds", thresholds)
    if directed:
        builder.keep(name, "direction", signal.by_channel(direction))
    size = float(neuron.threshold_at(*call.arguments))
    builder.margins[name] = Margin(np.abs(signal.unit) / size, signal.error / size)
    new = Signal.of_counts(name, signal.shape, steps)
    widths = {"directed": directed, "threshold_bits": threshold_bits, "membrane_bits": membrane_bits}
    return builder.add(description.Neuron, new, [signal], **widths)


@converts(SpikingMaxPool)
def _max_pool(call: Call, signals: list[Signal], builder: Builder) -> Signal:
    layer, (signal,) = call.layer, signals
    if signal.content != "counts":
        raise QsdError(f"max-pool {layer.name} sees {signal.content} instead of spikes; put a neuron before it.")
    pool = layer.pool
    kernel, stride, padding, dilation = (
        [value, value] if isinstance(value, int) else list(value)
        for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    after = []  # With ceil_mode the last window may reach beyond the padding.
    for axis in range(2):
        reach = (call.shape[1 + axis] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        after.append(max(reach - padding[axis] - signal.shape[1 + axis], 0))
    border = [padding[0], after[0], padding[1], after[1]]
    new = signal.renamed(layer.name, call.shape)
    geometry = {"kernel": kernel, "stride": stride, "padding": border, "dilation": dilation}
    return builder.add(description.MaxPool, new, [signal], **geometry)


@converts(SpikingProduct, SpikingQuery)
def _product(call: Call, signals: list[Signal], builder: Builder) -> Signal:
    layer, (left, right) = call.layer, signals
    query = type(layer) is SpikingQuery
    if right.content != "counts" or left.content != ("product" if query else "counts"):
        raise QsdError(f"product {layer.name} sees {left.content} and {right.content}; put neurons before it.")
    terms = left.shape[-1]
    new = replace(
        left,
        name=layer.name,
        shape=call.shape,
        content="product",
        low=np.zeros(1, np.int64),
        high=left.high[:1] * right.high[:1] * terms,
    )
    return builder.add(description.Query if query else description.Product, new, [left, right])


@converts("add")
def _add(call: Call, signals: list[Signal], builder: Builder) -> Signal:
    name = f"sum{call.output}"
    if len(signals) != 2 or any(value != 1 for value in call.arguments):
        raise QsdError(f"a constant is added after layer {signals[0].name}, which is no layer of qsd; make it one.")
    left, right = signals
    if any(x.content != "currents" for x in signals) or left.shape != right.shape:
        raise QsdError(f"{left.name} and {right.name} are added, but are no currents of one shape.")
    unit, other = (signal.by_channel(signal.unit) for signal in signals)
    if not np.allclose(unit, other, rtol=1e-12, atol=0):
        raise QsdError(f"{left.name} and {right.name} are added, but have different units; put a neuron between.")
    sums = {
        key: left.by_channel(getattr(left, key)) + right.by_channel(getattr(right, key))
        for key in ("low", "high", "offset", "error")
    }
    multiplied = left.multiplied or right.multiplied
    new = replace(left, name=name, unit=unit, multiplied=multiplied, **sums)
    return builder.add(description.Add, new, [left, right])


@converts("mean")
def _mean(call: Call, signals: list[Signal], builder: Builder) -> Signal:
    (signal,) = signals
    axes = sorted(axis % (len(signal.shape) + 1) for axis in call.arguments[0]) if call.arguments else []
    if signal.content != "currents" or len(signal.shape) != 3 or axes != [2, 3]:
        raise QsdError(f"a mean of {signal.name} is taken that is not one of currents over all positions.")
    positions = int(np.prod(signal.shape[1:]))
    summed = total(f"mean{call.output}", signal, builder)
    real = {key: getattr(summed, key) / positions for key in ("unit", "offset", "error")}
    summed = replace(summed, **real)
    return summed if call.shape == summed.shape else reshaped(f"{summed.name}.flat", summed, call.shape, builder)


@converts("mul", "div")
def _scale(call: Call, signals: list[Signal], _builder: Builder) -> Signal:
    """A factor of all values changes nothing but the meaning of a unit."""
    (number,) = call.arguments or (None,)
    if len(signals) != 1 or not isinstance(number, int | float) or signals[0].content != "currents" or number <= 0:
        raise QsdError(f"{signals[0].name} is multiplied by something that is no positive number.")
    factor = 1 / number if call.name == "div" else number
    real: dict[str, Any] = {key: getattr(signals[0], key) * factor for key in ("unit", "offset", "error")}
    return replace(signals[0], **real)


@converts("view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze")
def _reshape(call: Call, signals: list[Signal], builder: Builder) -> Signal:
    (signal,) = signals
    return signal if call.shape == signal.shape else reshaped(f"view{call.output}", signal, call.shape, builder)


@converts("permute", "transpose", "t")
def _permute(call: Call, signals: list[Signal], builder: Builder) -> Signal:
    (signal,) = signals
    rank = len(signal.shape) + 1
    if call.name == "permute":
        axes = [axis % rank for axis in call.arguments[0]]
    else:
        first, second = (axis % rank for axis in (call.arguments or (0, 1)))
        axes = [{first: second, second: first}.get(axis, axis) for axis in range(rank)]
    if axes[0] != 0 or (axes[1] != 1 and not signal.uniform):
        raise QsdError(f"the axes of {signal.name} are put in an order that mixes images or channels.")
    one = (
        {key: getattr(signal, key)[:1] for key in ("low", "high", "unit", "offset", "error")} if signal.uniform else {}
    )
    new = replace(signal, name=f"permute{call.output}", shape=call.shape, **one)
    return builder.add(description.Permute, new, [signal], axes=[axis - 1 for axis in axes[1:]])
