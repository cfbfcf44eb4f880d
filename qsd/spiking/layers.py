"""The layers of a converted network. Each can count, take steps, and run on a clock; all must agree.

In the count domain tensors are ``[B, ...]`` and spikes are counts ``0..T``. In steps they are ``[T * B, ...]``, the
steps in front: spikes are 0 or 1, and all that is linear acts on each step alone, so that sums over the window are
preserved. On the clock they are ``[B, ...]`` again, one tick at a time, and layers keep state between ticks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsd.errors import QsdError
from qsd.functional import exact_matmul, pad_frame, spike_count
from qsd.neurons import SpikeNeuron
from qsd.spiking.clock import Window
from qsd.spiking.runtime import IMAGE, Runtime, TracedTensor, matches, plain
from qsd.spiking.steps import charge, fire, pool_increment, product_increment

_NEURONS_AT_A_TIME = 2**16


class TimedLayer(nn.Module):
    """A layer of a converted network, in its modes: ``count``, ``step``, and ``tick`` on a clock.

    It may run several times in a pass, on the levels of a pyramid: ``call`` is the name of the present call, and each
    call has a state of its own (a chip would have a copy of the layer for each level).

    Args:
        name: dotted name in the trained model.
        runtime: of the converted network.
    """

    def __init__(self, name: str, runtime: Runtime) -> None:
        super().__init__()
        self.name, self.runtime = name, runtime
        self.call = name

    def count(self, *inputs: Tensor) -> Tensor:
        """Sums over the window to sums over the window, ``[B, ...]``.

        Args:
            inputs: spike counts, or accumulated currents.
        """
        raise NotImplementedError

    def step(self, *inputs: Tensor) -> Tensor:
        """All steps of the window at once, ``[T * B, ...]``.

        Args:
            inputs: binary spikes, or currents.
        """
        raise NotImplementedError

    def tick(self, window: Window, *inputs: Tensor) -> Tensor:
        """One tick of the clock, ``[B, ...]``.

        Args:
            window: where this tick lies in the window of the inputs, and the layer's state.
            inputs: what arrives in this tick.
        """
        raise NotImplementedError

    def lag(self) -> int:
        """Steps by which the output's window lies behind the inputs'."""
        return 0

    def occupation(self) -> int:
        """Steps for which an image occupies the layer's state."""
        return self.runtime.time_steps

    def check_sources(self, *inputs: Tensor) -> None:
        """Look at whose spikes come in, while the network is traced.

        Args:
            inputs: marked tensors.
        """

    def source(self) -> "DelayedNeuron | None":
        """The neuron whose spikes the output holds, if it holds spikes."""
        return None

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the mode of the runtime asks for."""
        runtime = self.runtime
        self.call = runtime.call(self.name)
        if runtime.mode == "count":
            return self.count(*inputs)
        if runtime.mode == "step":
            return self.step(*inputs)
        inputs, arrival = runtime.aligned(inputs)
        if runtime.mode == "trace":
            self.check_sources(*inputs)
            runtime.occupation[self.call] = self.occupation()
            output = self.count(*(plain(x) for x in inputs))
        else:
            image = any(getattr(x, "source", None) is IMAGE for x in inputs)
            output = self.tick(runtime.clock.window(self.call, arrival, image), *(plain(x) for x in inputs))
        return TracedTensor.mark(output, self.source(), arrival + self.lag(), runtime)


class DelayedNeuron(TimedLayer):
    """Delayed integrate-and-fire neuron: charges in steps 1..T, may fire in steps d+1..d+T of its window.

    At ``d >= T - 1`` it fires exactly the trained neuron's count, for every input (theorem: all input is in before the
    first chance to fire, and T chances follow). Its spikes are 0 or 1; what one is worth lies in the next weights,
    unless something else than a layer of ours uses them (``scaled``): then it is multiplied here, which is exact too,
    but not spike-driven.

    Behind a product of spikes it is handed, beside the integer currents, what a unit of them is worth; its threshold
    takes that up, anew for every size of the image.

    Args:
        trained: the neuron that it stands for.
        name: its dotted name in the trained model.
        delay: d, in steps.
        runtime: of the converted network.
    """

    def __init__(self, trained: SpikeNeuron, name: str, delay: int, runtime: Runtime) -> None:
        super().__init__(name, runtime)
        self.delay = delay
        self.time_steps, self.threshold, self.amplitude = trained.time_steps, trained.threshold, trained.amplitude
        self.drive = trained.drive
        self.scaled = False

    def step_size(self, features: int) -> float:
        """What one spike stands for, as the neurons of `qsd.neurons` tell it.

        Args:
            features: size of the layer; without effect.
        """
        del features
        return self.threshold

    def lag(self) -> int:
        return self.runtime.delay(self.name, self.delay)

    def occupation(self) -> int:
        return self.time_steps + self.lag()

    def source(self) -> "DelayedNeuron | None":
        return None if self.scaled else self

    def _emit(self, spikes: Tensor) -> Tensor:
        return spikes * self.amplitude if self.scaled else spikes

    def count(self, *inputs: Any) -> Tensor:
        x, *scale = inputs
        counts = spike_count(x / self._threshold(*scale) if scale else self.drive(x), self.time_steps)
        if self.runtime.on_counts is not None:
            self.runtime.on_counts(self.call, counts)
        return self._emit(counts)

    def _threshold(self, scale: float = 1.0) -> float:
        return self.threshold / scale

    def step(self, *inputs: Any) -> Tensor:
        x, *scale = inputs
        runtime, steps = self.runtime, self.time_steps
        if runtime.is_constant(x):
            raise self._sees_an_image()
        delay, threshold, records = self.lag(), self._threshold(*scale), matches(self.call, runtime.record)
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        currents = runtime.split(x)
        spikes = torch.empty_like(currents)
        shape = (steps + delay if records else 0, *currents.shape[1:])
        potentials = currents.new_empty_strided(shape, currents.stride())
        # Neurons do not see each other. Some thousands at a time, their membranes stay in the processor's cache.
        columns = (
            t.as_strided((len(t), currents[0].numel()), (currents.stride(0), 1)) for t in (currents, spikes, potentials)
        )
        for current, spike, potential in zip(*(column.split(_NEURONS_AT_A_TIME, dim=1) for column in columns)):
            membrane = torch.full_like(current[0], threshold / 2)
            for t in range(steps + delay):
                if t < steps:
                    charge(membrane, current[t])
                if records:
                    potential[t] = membrane
                if t >= delay:
                    fire(membrane, threshold, spike[t - delay])
        if records:
            runtime.trace.spikes[self.call] = spikes.bool()
            runtime.trace.counts[self.call] = spikes.sum(0, dtype=torch.uint8)
            runtime.trace.membrane[self.call] = potentials
        if runtime.on_counts is not None:
            runtime.on_counts(self.call, spikes.sum(0))
        return self._emit(spikes.flatten(0, 1))

    def tick(self, window: Window, *inputs: Any) -> Tensor:
        x, *scale = inputs
        if window.constant:
            raise self._sees_an_image()
        spikes, delay, state = torch.zeros_like(x), self.lag(), window.state
        threshold = self._threshold(*scale)
        if window.begins:
            state["membrane"], state["count"] = torch.full_like(x, threshold / 2), torch.zeros_like(x)
        if window.open:
            charge(state["membrane"], x)
        if window.within(delay, self.time_steps):
            fire(state["membrane"], threshold, spikes)
            state["count"] = state["count"] + spikes
        if self.runtime.on_counts is not None and window.step == delay + self.time_steps:
            self.runtime.on_counts(self.call, state["count"])
        return self._emit(spikes)

    def _sees_an_image(self) -> QsdError:
        return QsdError(
            f"neuron {self.name} sees an image: put a convolution or linear layer of ours before it; if the input is "
            "currents and no image, convert with currents=True."
        )

    def extra_repr(self) -> str:
        return f"time_steps={self.time_steps}, threshold={self.threshold:g}, delay={self.delay}"


class Convolution(nn.Module):
    """One linear factor, norms folded in.

    Args:
        weight: ``[C_out, C_in / groups, k, k]``.
        bias: ``[C_out]``.
        stride: of the kernel.
        padding: pixels of zeros around the input.
        groups: of channels.
        frame: value by channel ``[C_out]`` of one pixel put around the output, or ``None`` for no frame.
    """

    weight: Tensor
    bias: Tensor
    frame: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        frame: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("frame", frame)
        self.register_buffer("scale", None)
        self.stride, self.padding, self.groups = stride, padding, groups

    def quantize(self, bits: int, dtype: torch.dtype) -> None:
        """Round the weights to integers times a scale by output channel (symmetric).

        Args:
            bits: of the integers.
            dtype: in which the scale has to be exact, so that the weights can be rebuilt in that type.
        """
        largest = self.weight.abs().amax(dim=(1, 2, 3))
        scale = torch.where(largest > 0, largest / (2 ** (bits - 1) - 1), 1.0).to(dtype).to(self.weight.dtype)
        self.restore((self.weight / scale.view(-1, 1, 1, 1)).round(), scale, self.bias)

    def integers(self) -> Tensor:
        """The integers of quantized weights, int16 ``[C_out, C_in / groups, k, k]``."""
        assert self.scale is not None
        return (self.weight / self.scale.view(-1, 1, 1, 1)).round().to(torch.int16)

    def restore(self, integers: Tensor, scale: Tensor, bias: Tensor) -> None:
        """Put in quantized weights.

        Args:
            integers: ``[C_out, C_in / groups, k, k]``.
            scale: what one of them is worth, ``[C_out]``.
            bias: ``[C_out]``.
        """
        self.scale = scale.to(self.weight)
        self.weight = integers.to(self.weight) * self.scale.view(-1, 1, 1, 1)
        self.bias = bias.to(self.weight)

    def forward(self, x: Tensor, share: float = 1.0) -> Tensor:
        """Convolve ``[B, C_in, H, W]``, with a share of bias and frame.

        Args:
            x: input.
            share: 1 in the count domain, 1/T in a step: over a window both are added once.
        """
        y = F.conv2d(x, self.weight, self.bias * share, self.stride, self.padding, groups=self.groups)
        return y if self.frame is None else pad_frame(y, self.frame * share)


class SpikingLinear(TimedLayer):
    """A synapse: linear map from spikes to currents. Its bias is injected in T equal parts.

    Subclasses implement `linear_map` and `absorb`.
    """

    def linear_map(self, x: Tensor, share: float) -> Tensor:
        """Apply the layer with a share of its bias.

        Args:
            x: spikes, counts, or an image.
            share: of the bias.
        """
        raise NotImplementedError

    def absorb(self, amplitude: float) -> None:
        """Multiply the weights that spikes meet by what one of them is worth.

        Args:
            amplitude: value of one incoming spike.
        """
        raise NotImplementedError

    def check_sources(self, *inputs: Tensor) -> None:
        source = getattr(inputs[0], "source", None)
        if self.runtime.sources.setdefault(self.name, source) is not source:
            raise QsdError(f"layer {self.name} is used twice, on different neurons' spikes; make it two layers.")

    def count(self, *inputs: Tensor) -> Tensor:
        return self.linear_map(inputs[0], 1.0)

    def step(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        steps = self.runtime.time_steps
        if self.runtime.is_constant(x):  # an image: computed once, and the same current in every step
            current = self.linear_map(x, 1.0) / steps
            return torch.cat([current] * steps)  # which keeps the layout of channels, as repeat does not
        return self.linear_map(x, 1 / steps)

    def tick(self, window: Window, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        if not window.open:
            return self.linear_map(torch.zeros_like(x), 0.0)
        steps = self.runtime.time_steps
        return self.linear_map(x, 1.0) / steps if window.constant else self.linear_map(x, 1 / steps)


class SpikingChain(SpikingLinear):
    """A chain of convolutions, as factors and perhaps merged into one.

    The count domain evaluates the factors. Steps use the merged kernel where there is one: equal, but every synaptic
    operation then sees spikes.

    Args:
        factors: convolutions by name, in the order of application.
        merged: one convolution equal to them, or ``None``.
        merged_counts: evaluate the merged one in the count domain too (if it is not equal: quantized).
        name: dotted name in the trained model.
        runtime: of the converted network.
    """

    def __init__(
        self,
        factors: dict[str, Convolution],
        merged: Convolution | None,
        merged_counts: bool,
        name: str,
        runtime: Runtime,
    ) -> None:
        super().__init__(name, runtime)
        self.factors = nn.ModuleDict(factors)
        self.merged: Convolution | None = merged
        self.merged_counts = merged_counts

    @property
    def convolutions(self) -> dict[str, Convolution]:
        """The factors by name, in the order of application."""
        return {name: factor for name, factor in self.factors.items() if isinstance(factor, Convolution)}

    def absorb(self, amplitude: float) -> None:
        next(iter(self.convolutions.values())).weight.mul_(amplitude)
        if self.merged is not None:
            self.merged.weight.mul_(amplitude)

    def linear_map(self, x: Tensor, share: float) -> Tensor:
        if self.merged is not None and (self.merged_counts or self.runtime.mode in ("step", "clock")):
            return self.merged(x, share)
        for convolution in self.convolutions.values():
            x = convolution(x, share)
        return x


class SpikingDense(SpikingLinear):
    """A fully connected layer, such as the classifier.

    Args:
        weight: ``[C_out, C_in]``.
        bias: ``[C_out]``.
        name: dotted name in the trained model.
        runtime: of the converted network.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, name: str, runtime: Runtime) -> None:
        super().__init__(name, runtime)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def absorb(self, amplitude: float) -> None:
        self.weight.mul_(amplitude)

    def linear_map(self, x: Tensor, share: float) -> Tensor:
        return F.linear(x, self.weight, self.bias * share)


class SpikingPooledDense(SpikingDense):
    """A classifier behind a mean over positions: spikes ``[B, C, H, W]`` to ``[B, C_out]``.

    The mean's 1/N lies in the weights, so that every spike of every position adds a column of them.
    """

    def linear_map(self, x: Tensor, share: float) -> Tensor:
        spikes, positions = x.flatten(2), x.shape[2] * x.shape[3]
        if self.runtime.mode in ("count", "trace"):  # the same, in fewer operations
            return F.linear(spikes.sum(2), self.weight / positions, self.bias * share)
        currents = F.linear(spikes.transpose(1, 2), self.weight / positions)
        return currents.sum(1) + self.bias * share


class SpikingMaxPool(TimedLayer):
    """Max-pool of binary spikes, by temporal decomposition: how much the largest of the running sums has grown.

    That is 0 or 1, and adds up to the largest of the counts, whenever the spikes come. At delay T - 1 trains have no
    gaps, and "any of them fires" is the same: then no sums are kept. Padding with zeros is padding with nothing, since
    counts are not negative.

    Args:
        pool: the trained pool.
        name: its dotted name in the trained model.
        runtime: of the converted network.
    """

    def __init__(self, pool: nn.MaxPool2d, name: str, runtime: Runtime) -> None:
        super().__init__(name, runtime)
        self.pool = pool

    def check_sources(self, *inputs: Tensor) -> None:
        self.runtime.sources[self.name] = getattr(inputs[0], "source", None)

    def source(self) -> Any:
        return self.runtime.sources.get(self.name)

    @property
    def without_gaps(self) -> bool:
        """Whether every spike train that comes in is contiguous from its first step on."""
        neuron = self.source()
        lossless = self.runtime.time_steps - 1
        return isinstance(neuron, DelayedNeuron) and self.runtime.delay(neuron.name, neuron.delay) >= lossless

    def count(self, *inputs: Tensor) -> Tensor:
        return self.pool(inputs[0])

    def step(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        if self.runtime.is_constant(x) or self.without_gaps:
            return self.pool(x)
        total = pooled = None
        increments = []
        for spikes in self.runtime.split(x):
            increment, total, pooled = pool_increment(spikes, total, pooled, self.pool)
            increments.append(increment)
        return torch.cat(increments)

    def tick(self, window: Window, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        if window.constant or self.without_gaps:
            return self.pool(x)
        state = window.state
        if window.begins:
            state.clear()
        increment, state["sum"], state["pooled"] = pool_increment(x, state.get("sum"), state.get("pooled"), self.pool)
        return increment


class SpikingProduct(TimedLayer):
    """Product ``left @ right`` of two trains of spikes, ``[..., I, C]`` and ``[..., C, J]``, by temporal decomposition.

    Every step's increment has terms with one binary operand each; their sum over the window is the product of the
    counts, whenever the spikes come.
    """

    def count(self, *inputs: Tensor) -> Tensor:
        left, right = inputs
        return exact_matmul(left, right)

    def step(self, *inputs: Tensor) -> Tensor:
        left, right = (self.runtime.split(x) for x in inputs)
        left_sum, right_sum = torch.zeros_like(left[0]), torch.zeros_like(right[0])
        increments = []
        for x, y in zip(left, right):
            increment, left_sum, right_sum = product_increment(x, y, left_sum, right_sum)
            increments.append(increment)
        return torch.cat(increments)

    def tick(self, window: Window, *inputs: Tensor) -> Tensor:
        left, right = inputs
        state = window.state
        if window.begins or not state:
            state["left"], state["right"] = torch.zeros_like(left), torch.zeros_like(right)
        increment, state["left"], state["right"] = product_increment(left, right, state["left"], state["right"])
        return increment


class SpikingQuery(TimedLayer):
    """Binary query spikes ``[..., C, N]`` that add columns of an integer matrix ``M``, ``[..., I, C]``.

    The matrix comes as increments. The query waits ``T - 1`` steps until it is complete: taken increment by increment
    the product would multiply integers by integers, which is not spike-driven.
    """

    def lag(self) -> int:
        return self.runtime.time_steps - 1

    def occupation(self) -> int:
        return 2 * self.runtime.time_steps - 1

    def count(self, *inputs: Tensor) -> Tensor:
        matrix, query = inputs
        return exact_matmul(matrix, query)

    def step(self, *inputs: Tensor) -> Tensor:
        increments, query = (self.runtime.split(x) for x in inputs)
        return (increments.sum(0) @ query).flatten(0, 1)

    def tick(self, window: Window, *inputs: Tensor) -> Tensor:
        increment, query = inputs
        state = window.state
        if window.begins or not state:
            state["matrix"] = torch.zeros_like(increment)
        state["matrix"] = state["matrix"] + increment
        return state["matrix"] @ self.runtime.clock.hold(query, self.lag())
