"""The base of all layers of a converted network.

A layer runs in three ways that must agree. In the count domain tensors are ``[B, ...]`` and spikes are counts
``0..T``. In time steps they are ``[steps * B, ...]``, the steps in front: spikes are 0 or 1, and a linear map acts on
each step alone, so that sums over the window are preserved. On the clock they are ``[B, ...]`` again, one tick at a
time, and layers keep state between ticks. The code (`qsd.spiking.codes`) tells the number of steps, T in the unary
code, and the value of a spike.

A layer also answers for itself: the audit asks for its role, the energy for its operations, and the size of a network
for its stored bits. The engine knows no more of a layer than this class tells, so that a layer defined elsewhere has
the same rights as those of this package.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from qsd.spiking.clock import Window
from qsd.spiking.codes import Code
from qsd.spiking.layers.costs import LayerInputs, Operations
from qsd.spiking.layers.linear_movement import default_movement
from qsd.spiking.layers.movement import UNKNOWN, Movement
from qsd.spiking.runtime import Runtime
from qsd.spiking.signals import IMAGE, MarkedTensor, plain

# To the audit a synapse holds weights and sees one input, a product multiplies two inputs, a pool compares the values
# of one input, and the operations of a neuron are its own dynamics and no synaptic operations.
Role = Literal["synapse", "product", "pool", "neuron"]


class TimedLayer(nn.Module):
    """A layer of a converted network.

    It may run several times in a pass, on the levels of a pyramid: ``call`` is the name of the present call, and each
    call has a state of its own (a chip would have a copy of the layer for each level).

    A subclass sets ``role`` and implements the methods that raise `NotImplementedError` here; conversion names those
    that it lacks.

    Args:
        name: Dotted name in the trained model.
        runtime: Runtime of the converted network.
    """

    role: ClassVar[Role]

    def __init__(self, name: str, runtime: Runtime) -> None:
        super().__init__()
        self.name, self.runtime = name, runtime
        self.call = name

    @property
    def codes(self) -> tuple[Code, ...]:
        """The codes of the present call's inputs: spikes are digits, currents add up as they are."""
        return self.runtime.run.codes[self.name]

    @abstractmethod
    def count(self, *inputs: Tensor) -> Tensor:
        """Sums over the window to sums over the window, ``[B, ...]``.

        Args:
            inputs: Spike counts, or accumulated currents.
        """
        raise NotImplementedError

    @abstractmethod
    def step(self, constant: bool, *inputs: Tensor) -> Tensor:
        """All steps of the window at once, ``[steps * B, ...]``.

        Args:
            constant: Whether the input is an image, ``[B, ...]``, and the same in every step.
            inputs: Binary spikes, or currents.
        """
        raise NotImplementedError

    @abstractmethod
    def tick(self, window: Window, *inputs: Tensor) -> Tensor:
        """One tick of the clock, ``[B, ...]``.

        Args:
            window: Place of this tick in the window of the inputs, and the layer's state.
            inputs: Inputs of this tick.
        """
        raise NotImplementedError

    @abstractmethod
    def operations(self, inputs: LayerInputs) -> Operations | None:
        """Operations of one call, or ``None`` for a layer without cost.

        Args:
            inputs: Inputs of the call.
        """
        raise NotImplementedError

    @abstractmethod
    def stored_bits(self, weight_bits: Mapping[str, int], merged_bits: int | None) -> float:
        """Bits that the layer stores: weights at their width, scales and biases at 32 bits.

        Args:
            weight_bits: Width of the trained network's quantized weights, by name.
            merged_bits: Width of merged kernels; ``None`` for floats.
        """
        raise NotImplementedError

    def movement(self, inputs: LayerInputs, output: Tensor, operations: Operations | None) -> Movement:
        """Bits that one call moves; a layer that does not tell is taken for one linear map of its stored bits.

        Args:
            inputs: Inputs of the call.
            output: Output of the call, in the form of the inputs.
            operations: Operations of the call.
        """
        if operations is None:
            return Movement({}, UNKNOWN)
        stored = self.stored_bits(inputs.weight_bits, inputs.merged_bits)
        return default_movement(inputs, operations, inputs.size(output), stored)

    def kernels(self) -> list[Tensor]:
        """The weights that the layer runs with."""
        return [buffer for name, buffer in self.named_buffers() if name.rpartition(".")[2] == "weight"]

    def absorb(self, amplitude: float) -> None:
        """Multiply the weights that spikes meet by the amplitude of the spikes; a layer without weights refuses.

        Args:
            amplitude: Value of one incoming spike.
        """
        raise NotImplementedError

    def window_offset(self) -> int:
        """Time steps between the beginning of the inputs' window and that of the output's."""
        return 0

    def busy_steps(self) -> int:
        """Time steps for which an image occupies the layer's state."""
        return self.runtime.code.steps

    def check_sources(self, *inputs: Tensor) -> None:
        """Look at the sources of the inputs, while the network is traced.

        Args:
            inputs: Marked tensors.
        """

    def source(self) -> Any:
        """The source of the output, see `qsd.spiking.signals`: a current has none."""
        return None

    def part_name(self, part: nn.Module) -> str:
        """The name under which the audit lists an operation of this layer.

        Args:
            part: The module inside of the layer that computes it, or the layer itself.
        """
        del part
        return self.name

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run as the mode of the runtime says."""
        runtime = self.runtime
        self.call = runtime.call(self.name)
        if runtime.mode == "count":
            return self.count(*inputs)
        inputs, arrival = runtime.aligned(inputs)
        runtime.run.codes[self.name] = tuple(runtime.code_of(x) for x in inputs)
        constant = any(getattr(x, "source", None) is IMAGE for x in inputs)
        values = tuple(plain(x) for x in inputs)
        if runtime.mode == "step":
            output = self.step(constant, *values)
        elif runtime.mode == "clock":
            output = self.tick(runtime.run.clock.window(self.call, arrival, constant), *values)
        else:
            self.check_sources(*inputs)
            runtime.busy_steps[self.call] = self.busy_steps()
            output = self.count(*values)
        return MarkedTensor.mark(output, self.source(), arrival + self.window_offset(), runtime)


def missing_parts(layer: TimedLayer) -> list[str]:
    """The names of what a layer's class does not define although the engine needs it.

    Args:
        layer: Any layer.
    """
    kind = type(layer)
    methods = [name for name in dir(kind) if getattr(getattr(kind, name), "__isabstractmethod__", False)]
    return methods if hasattr(kind, "role") else ["role", *methods]
