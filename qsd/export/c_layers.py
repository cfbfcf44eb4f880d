"""The calls of the C functions of ``kernels.c`` for the layers of an integer network."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from qsd.export.c_memory import Memory
from qsd.integer import Description
from qsd.integer.description import AnyLayer, Layer


@dataclass
class Mode:
    """One of the two functions of a program.

    Attributes:
        network: The network.
        memory: Places of its signals.
        stepped: Whether it runs step by step.
        active: By signal the steps in which it may differ from zero.
    """

    network: Description
    memory: Memory
    stepped: bool
    active: dict[str, list[int]]

    @classmethod
    def of(cls, network: Description, stepped: bool) -> "Mode":
        """Counts or steps.

        Args:
            network: The network.
            stepped: Whether it runs step by step.
        """
        return cls(network, Memory(network, network.time_steps if stepped else 1), stepped, {})

    @property
    def steps(self) -> int:
        """Steps that lie in memory."""
        return self.memory.steps

    def at(self, name: str, step: str = "", scratch: bool = False, more: int = 0) -> str:
        """A pointer to a signal.

        Args:
            name: Name of the signal.
            step: Number or variable of a step, nothing for the first.
            scratch: Whether the memory is meant that the layer of this name needs while it runs.
            more: Integers behind the beginning.
        """
        if scratch:
            return f"(arena + {self.memory.scratch[name] // 4 + more})"
        place = self.memory.places[name]
        pointer = f"((uint8_t *)arena + {place}" if self.memory.holds_bytes(name) else f"(arena + {place // 4}"
        return f"{pointer}{f' + {step} * {self.layer(name).size}' if step else ''})"

    def layer(self, name: str) -> AnyLayer:
        """A layer.

        Args:
            name: Its name.
        """
        return next(layer for layer in self.network.layers if layer.name == name)

    def each_step(self, layer: Layer, call: Callable[[str], str]) -> list[str]:
        """A call for every step in which an input may differ from zero, and zeros in the others.

        Args:
            layer: The layer.
            call: Gives the call for a number or variable of a step.
        """
        if not self.stepped:
            return [call("")]
        steps = sorted({step for name in layer.inputs for step in self.active[name]})
        self.active[layer.name] = steps
        if len(steps) == self.steps:
            return [f"for (int t = 0; t < {self.steps}; ++t)", f"    {call('t')}"]
        return [*self.zeros(layer, steps), *(call(str(step)) for step in steps)]

    def zeros(self, layer: Layer, active: list[int]) -> list[str]:
        """Zeros in the steps of a layer's signal that are not active.

        Args:
            layer: The layer.
            active: The active steps.
        """
        self.active[layer.name] = active
        idle = [step for step in range(self.steps) if step not in active]
        return [f"qsd_zero({self.at(layer.name, str(step))}, {layer.size});" for step in idle]


def statements(layer: AnyLayer, number: int, mode: Mode) -> list[str]:
    """The C statements of a layer.

    Args:
        layer: The layer.
        number: Its number, which names its constants.
        mode: The function that it stands in.
    """
    return _STATEMENTS[layer.kind](layer, number, mode)


def _plane(layer: Any) -> str:
    """Channels and positions of a layer, as arguments."""
    return f"{layer.shape[0]}, {prod(layer.shape[1:])}"


def _pixels(layer: Any, number: int, mode: Mode) -> list[str]:
    zeros = mode.zeros(layer, [0]) if mode.stepped else []
    return [*zeros, f"qsd_look_up(table{number}, {_plane(layer)}, pixels, {mode.at(layer.name)});"]


def _events(layer: Any, _number: int, mode: Mode) -> list[str]:
    mode.active[layer.name] = list(range(mode.steps))
    function = f"qsd_spread(pixels, {mode.steps}, " if mode.stepped else "qsd_copy(pixels, "
    return [f"{function}{layer.size}, {mode.at(layer.name)});"]


def _convolution(layer: Any, number: int, mode: Mode) -> list[str]:
    source = layer.inputs[0]
    kind = "integers"
    if mode.memory.holds_bytes(source):
        kind = "spikes" if mode.stepped else "counts"
    return mode.each_step(
        layer,
        lambda t: f"qsd_convolve_{kind}(&layer{number}, {mode.at(source, t)}, {mode.at(layer.name, t)});",
    )


def _rescale(layer: Any, number: int, mode: Mode) -> list[str]:
    source, size = layer.inputs[0], layer.size
    lines, last = [], ""
    if mode.stepped:
        last, complete = str(mode.steps - 1), mode.at(layer.name, scratch=True)
        lines = mode.zeros(layer, [mode.steps - 1])
        lines.append(f"qsd_sum_steps({mode.at(source)}, {mode.steps}, {size}, {complete});")
    else:
        complete = mode.at(source)
    return [
        *lines,
        f"qsd_rescale(multiplier{number}, {layer.shift}, {_plane(layer)}, {complete}, {mode.at(layer.name, last)});",
    ]


def _add(layer: Any, _number: int, mode: Mode) -> list[str]:
    left, right = layer.inputs
    return mode.each_step(
        layer,
        lambda t: f"qsd_add({mode.at(left, t)}, {mode.at(right, t)}, {layer.size}, {mode.at(layer.name, t)});",
    )


def _total(layer: Any, number: int, mode: Mode) -> list[str]:
    source = layer.inputs[0]
    plane = _plane(mode.layer(source))
    lines = mode.each_step(layer, lambda t: f"qsd_total({mode.at(source, t)}, {plane}, {mode.at(layer.name, t)});")
    if layer.biased:
        lines.append(f"qsd_add_bias(bias{number}, {layer.shape[0]}, 1, {mode.at(layer.name)});")
        if mode.stepped and 0 not in mode.active[layer.name]:
            mode.active[layer.name].insert(0, 0)
    return lines


def _neuron(layer: Any, number: int, mode: Mode) -> list[str]:
    source, function = layer.inputs[0], "qsd_fire" if mode.stepped else "qsd_count_spikes"
    mode.active[layer.name] = list(range(mode.steps))
    return [f"{function}(&layer{number}, {mode.at(source)}, {mode.at(layer.name)});", *_watched(layer, number, mode)]


def _watched(layer: Any, number: int, mode: Mode) -> list[str]:
    """The call that shows spikes to whoever watches."""
    if not mode.stepped:
        return []
    return ["if (watch)", f"    watch({number}, {mode.at(layer.name)}, {mode.steps}, {layer.size});"]


def _max_pool(layer: Any, number: int, mode: Mode) -> list[str]:
    source = layer.inputs[0]
    lines = mode.each_step(
        layer, lambda t: f"qsd_max_pool(&layer{number}, {mode.at(source, t)}, {mode.at(layer.name, t)});"
    )
    return [*lines, *_watched(layer, number, mode)]


def _sizes(layer: Any, mode: Mode) -> str:
    """Heads, rows, terms and columns of a product, as arguments."""
    left, right = (mode.layer(name).shape for name in layer.inputs)
    return f"{prod(left[:-2])}, {left[-2]}, {left[-1]}, {right[-1]}"


def _product(layer: Any, _number: int, mode: Mode) -> list[str]:
    left, right = layer.inputs
    sizes = _sizes(layer, mode)
    if not mode.stepped:
        return [f"qsd_product_counts({sizes}, {mode.at(left)}, {mode.at(right)}, {mode.at(layer.name)});"]
    size = mode.layer(left).size
    sums = mode.at(layer.name, scratch=True), mode.at(layer.name, scratch=True, more=size)
    operands = f"{mode.at(left, 't')}, {mode.at(right, 't')}"
    mode.active[layer.name] = list(range(mode.steps))
    return [
        f"qsd_zero({sums[0]}, {size + mode.layer(right).size});",
        f"for (int t = 0; t < {mode.steps}; ++t)",
        f"    qsd_product_spikes({sizes}, {operands}, {sums[0]}, {sums[1]}, {mode.at(layer.name, 't')});",
    ]


def _query(layer: Any, _number: int, mode: Mode) -> list[str]:
    matrix, spikes = layer.inputs
    sizes = _sizes(layer, mode)
    if not mode.stepped:
        return [f"qsd_query_counts({sizes}, {mode.at(matrix)}, {mode.at(spikes)}, {mode.at(layer.name)});"]
    complete = mode.at(layer.name, scratch=True)
    mode.active[layer.name] = list(range(mode.steps))
    return [
        f"qsd_sum_steps({mode.at(matrix)}, {mode.steps}, {mode.layer(matrix).size}, {complete});",
        f"for (int t = 0; t < {mode.steps}; ++t)",
        f"    qsd_query_spikes({sizes}, {complete}, {mode.at(spikes, 't')}, {mode.at(layer.name, 't')});",
    ]


def _reshape(layer: Any, _number: int, mode: Mode) -> list[str]:
    if mode.stepped:
        mode.active[layer.name] = mode.active[layer.inputs[0]]
    return []


def _permute(layer: Any, number: int, mode: Mode) -> list[str]:
    source = layer.inputs[0]
    kind = "spikes" if mode.memory.holds_bytes(source) else "integers"
    return mode.each_step(
        layer,
        lambda t: f"qsd_permute_{kind}(size{number}, stride{number}, {mode.at(source, t)}, {mode.at(layer.name, t)});",
    )


_STATEMENTS: dict[str, Callable[[Any, int, Mode], list[str]]] = {
    "pixels": _pixels,
    "events": _events,
    "convolution": _convolution,
    "rescale": _rescale,
    "add": _add,
    "total": _total,
    "neuron": _neuron,
    "max_pool": _max_pool,
    "product": _product,
    "query": _query,
    "reshape": _reshape,
    "permute": _permute,
}
