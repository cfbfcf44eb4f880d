"""The construction of an integer network: a register of converters by the type of a layer, and what they add to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from qsd.errors import QsdError
from qsd.integer.description import LARGEST_WIDTH, AnyLayer, width
from qsd.integer.margins import Margin
from qsd.integer.signals import Signal
from qsd.integer.streams import Streams
from qsd.integer.tracing import Call
from qsd.spiking import SpikingNetwork
from qsd.spiking.layers import TimedLayer

# A converter gets the call of a layer, the signals that it takes and the builder, adds layers of
# `qsd.integer.description` and returns the signal of the last one.
Converter = Callable[[Call, list[Signal], "Builder"], Signal]
_C = TypeVar("_C", bound=Converter)
CONVERTERS: dict[type[nn.Module] | str, Converter] = {}


def converts(*kinds: type[TimedLayer] | str) -> Callable[[_C], _C]:
    """Decorator: convert layers of exactly these types, or operations of PyTorch of these names, by the function.

    A subclass computes something else than its base class and needs a converter of its own.

    Args:
        kinds: Types of converted layers, or names of operations between layers.
    """

    def register(converter: _C) -> _C:
        CONVERTERS.update(dict.fromkeys(kinds, converter))
        return converter

    return register


@dataclass
class Builder:
    """An integer network in construction.

    Attributes:
        spiking: The network of spikes, in float64.
        streams: The units of running sums of several branches.
        inner_bits: Largest width of values between the convolutions of a chain.
        trial: Whether nothing but the ranges is wanted, of any width.
        layers: The layers up to now.
        arrays: Their arrays, by ``layer/array``.
        margins: By neuron how far its membrane can be from the one of the network with floats.
    """

    spiking: SpikingNetwork
    streams: Streams
    inner_bits: int
    trial: bool = False
    layers: list[AnyLayer] = field(default_factory=list)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    margins: dict[str, Margin] = field(default_factory=dict)

    @property
    def time_steps(self) -> int:
        """T."""
        return self.spiking.time_steps

    def convert(self, call: Call, signals: list[Signal]) -> Signal:
        """Add the integer layers of a call.

        Args:
            call: A call of the traced network.
            signals: The signals that it takes.

        Raises:
            QsdError: If it has no integers.
        """
        kind = call.name if call.layer is None else type(call.layer)
        converter = CONVERTERS.get(kind)
        if converter is None:
            what = f"operation {call.name} between layers" if call.layer is None else f"layer {call.name}"
            shown = "" if call.layer is None else f" ({type(call.layer).__name__})"
            raise QsdError(f"{what}{shown} has no integers; register a converter with @qsd.integer.converts.")
        return converter(call, signals, self)

    def add(self, kind: type[Any], signal: Signal, inputs: list[Signal], **more: Any) -> Signal:
        """Add a layer.

        Args:
            kind: Its class in `qsd.integer.description`.
            signal: The signal that it gives, with the name of the layer.
            inputs: The signals that it takes.
            more: The further fields of its description.

        Returns:
            The signal.

        Raises:
            QsdError: If the range of the signal needs more than 32 bits.
        """
        if self.trial:
            return signal
        low, high = int(signal.low.min()), int(signal.high.max())
        bits = self.check_width(signal.name, low, high)
        facts = {"shape": list(signal.shape), "low": low, "high": high, "bits": bits, "signed": low < 0}
        names = [source.name for source in inputs]
        self.layers.append(kind(name=signal.name, inputs=names, **facts, **more))
        return signal

    def check_width(self, name: str, low: int, high: int, largest: int = LARGEST_WIDTH) -> int:
        """The width of a range.

        Args:
            name: Name of the layer, for the message.
            low: Least value.
            high: Largest value.
            largest: Bits of the signed integers that have to hold the range.

        Raises:
            QsdError: If they do not.
        """
        needed = width(min(low, -1), high)
        if needed > largest and not self.trial:
            raise TooWide(
                f"layer {name}: integers from {low} to {high} need {needed} bits, and at most {largest} are "
                "allowed; use fewer fractional_bits or weights of fewer bits."
            )
        return width(low, high)

    def keep(self, layer: str, array: str, values: NDArray[Any]) -> None:
        """Store an array of a layer.

        Args:
            layer: Name of the layer.
            array: Name of the array.
            values: Its integers; they are stored in the narrowest type.
        """
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        kinds = (np.int8, np.int16, np.int32, np.int64)
        kind = next(kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
        self.arrays[f"{layer}/{array}"] = np.ascontiguousarray(values, kind)


class TooWide(QsdError):
    """A range does not fit into the widths that are allowed."""
