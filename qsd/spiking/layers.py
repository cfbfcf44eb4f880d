"""The layers of a converted network. Each has a count-domain and a stepping form, and both must agree.

In the count domain tensors are ``[B, ...]`` and spikes are counts ``0..T``. In steps they are ``[T * B, ...]``, the
steps in front: spikes are 0 or 1, and all that is linear acts on each step alone, so that sums over the window are
preserved.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsd.errors import QsdError
from qsd.functional import linear_attention, pad_frame, spike_count
from qsd.neurons import SpikeNeuron
from qsd.spiking.runtime import Runtime, TracedTensor, plain
from qsd.spiking.steps import charge, fire, outer_increment


class DelayedNeuron(nn.Module):
    """Delayed integrate-and-fire neuron: charges in steps 1..T, may fire in steps d+1..d+T of its window.

    At ``d >= T - 1`` it fires exactly the trained neuron's count, for every input (theorem: all input is in before the
    first chance to fire, and T chances follow). Its spikes are 0 or 1; what one is worth lies in the next weights,
    unless something else than a layer of ours uses them (``scaled``): then it is multiplied here, which is exact too,
    but not spike-driven.

    Args:
        trained: the neuron that it stands for.
        name: its dotted name in the trained model.
        delay: d, in steps.
        runtime: of the converted network.
    """

    def __init__(self, trained: SpikeNeuron, name: str, delay: int, runtime: Runtime) -> None:
        super().__init__()
        self.name, self.delay, self.runtime = name, delay, runtime
        self.time_steps, self.threshold, self.amplitude = trained.time_steps, trained.threshold, trained.amplitude
        self.drive = trained.drive
        self.scaled = False

    def _emit(self, spikes: Tensor) -> Tensor:
        return spikes * self.amplitude if self.scaled else spikes

    def forward(self, x: Tensor) -> Tensor:
        """Accumulated input to counts, or currents to binary spikes; the shape stays."""
        if self.runtime.mode == "step":
            return self._step(x)
        counts = spike_count(self.drive(plain(x)), self.time_steps)
        if self.runtime.mode == "trace":
            delay = self.runtime.delay(self.name, self.delay)
            return TracedTensor.mark(counts, None if self.scaled else self, getattr(x, "arrival", 0) + delay)
        if self.runtime.on_counts is not None:
            self.runtime.on_counts(self.name, counts)
        return self._emit(counts)

    def _step(self, x: Tensor) -> Tensor:
        runtime, steps = self.runtime, self.time_steps
        if runtime.is_constant(x):
            raise QsdError(f"neuron {self.name} sees an image: put a convolution or linear layer of ours before it.")
        currents = runtime.split(x)
        delay = runtime.delay(self.name, self.delay)
        membrane = torch.full_like(currents[0], self.threshold / 2)
        spikes = torch.zeros(currents.shape, dtype=torch.bool, device=x.device)
        potentials: list[Tensor] | None = [] if runtime.records(self.name) else None
        for t in range(steps + delay):
            if t < steps:
                membrane = charge(membrane, currents[t])
            if potentials is not None:
                potentials.append(membrane)
            if t >= delay:
                spikes[t - delay], membrane = fire(membrane, self.threshold)
        if potentials is not None:
            runtime.trace.spikes[self.name] = spikes
            runtime.trace.counts[self.name] = spikes.sum(0, dtype=torch.uint8)
            runtime.trace.membrane[self.name] = torch.stack(potentials)
        if runtime.on_counts is not None:
            runtime.on_counts(self.name, spikes.sum(0, dtype=x.dtype))
        return self._emit(spikes.flatten(0, 1).to(x.dtype))

    def extra_repr(self) -> str:
        return f"time_steps={self.time_steps}, threshold={self.threshold:g}, delay={self.delay}"


@dataclass(frozen=True)
class Convolution:
    """One linear factor, norms folded in.

    Attributes:
        weight: ``[C_out, C_in / groups, k, k]``.
        bias: ``[C_out]``.
        stride: of the kernel.
        padding: pixels of zeros around the input.
        groups: of channels.
        frame: value by channel ``[C_out]`` of one pixel put around the output, or ``None`` for no frame.
    """

    weight: Tensor
    bias: Tensor
    stride: int = 1
    padding: int = 0
    groups: int = 1
    frame: Tensor | None = None

    def apply(self, x: Tensor, share: float) -> Tensor:
        """Convolve ``[B, C_in, H, W]``, with a share of bias and frame.

        Args:
            x: input.
            share: 1 in the count domain, 1/T in a step: over a window both are added once.
        """
        y = F.conv2d(x, self.weight, self.bias * share, self.stride, self.padding, groups=self.groups)
        return y if self.frame is None else pad_frame(y, self.frame * share)


class SpikingLinear(nn.Module):
    """A synapse: linear map from spikes to currents. Its bias is injected in T equal parts.

    Subclasses implement `linear_map`.

    Args:
        name: dotted name in the trained model.
        runtime: of the converted network.
    """

    def __init__(self, name: str, runtime: Runtime) -> None:
        super().__init__()
        self.name, self.runtime = name, runtime

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

    def forward(self, x: Tensor) -> Tensor:
        """Spikes (or counts, or an image) to currents."""
        runtime = self.runtime
        if runtime.mode == "trace":
            source = getattr(x, "source", None)
            if runtime.sources.setdefault(self.name, source) is not source:
                raise QsdError(f"layer {self.name} is used twice, on different neurons' spikes; make it two layers.")
            return TracedTensor.mark(self.linear_map(plain(x), 1.0), None, getattr(x, "arrival", 0))
        if runtime.mode == "count":
            return self.linear_map(x, 1.0)
        if runtime.is_constant(x):  # an image: computed once, and the same current in every step
            current = self.linear_map(x, 1.0) / runtime.time_steps
            return current.repeat(runtime.time_steps, *[1] * (current.dim() - 1))
        return self.linear_map(x, 1 / runtime.time_steps)


class SpikingChain(SpikingLinear):
    """A chain of convolutions, as factors and perhaps merged into one.

    The count domain evaluates the factors. Steps use the merged kernel where there is one: equal, but every synaptic
    operation then sees spikes.

    Args:
        factors: convolutions in the order of application.
        merged: one convolution equal to them, or ``None``.
        merged_counts: evaluate the merged one in the count domain too (if it is not equal: quantized).
        name: dotted name in the trained model.
        runtime: of the converted network.
    """

    def __init__(
        self, factors: list[Convolution], merged: Convolution | None, merged_counts: bool, name: str, runtime: Runtime
    ) -> None:
        super().__init__(name, runtime)
        self.merged_counts = merged_counts
        self._fields: dict[str, list[Convolution]] = {}
        self._store("factors", factors)
        self._store("merged", [] if merged is None else [merged])

    def _store(self, kind: str, convolutions: list[Convolution]) -> None:
        # Tensors as buffers, so that they move and convert with the module.
        self._fields[kind] = convolutions
        for i, convolution in enumerate(convolutions):
            for key in ("weight", "bias", "frame"):
                self.register_buffer(f"{kind}_{i}_{key}", getattr(convolution, key))

    def convolutions(self, kind: str) -> list[Convolution]:
        """The ``"factors"``, or the ``"merged"`` one (a list of one, or of none)."""
        return [
            Convolution(
                getattr(self, f"{kind}_{i}_weight"),
                getattr(self, f"{kind}_{i}_bias"),
                c.stride,
                c.padding,
                c.groups,
                getattr(self, f"{kind}_{i}_frame"),
            )
            for i, c in enumerate(self._fields[kind])
        ]

    def absorb(self, amplitude: float) -> None:
        for kind, convolutions in self._fields.items():
            if convolutions:
                getattr(self, f"{kind}_0_weight").mul_(amplitude)

    def linear_map(self, x: Tensor, share: float) -> Tensor:
        stepping = self.runtime.mode == "step"
        use_merged = self._fields["merged"] and (stepping or self.merged_counts)
        for convolution in self.convolutions("merged" if use_merged else "factors"):
            x = convolution.apply(x, share)
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


class SpikingAttention(nn.Module):
    """Spike-driven self-attention ``neuron(q (k^T v))`` on binary spikes.

    ``M = k^T v`` is accumulated from increments with one binary operand each. The query waits ``T - 1`` steps until M
    is complete, and then its binary spikes add rows of the integer matrix M: taken step by step like ``k^T v`` it
    would multiply integers by integers, which is not spike-driven.

    Args:
        parts: the converted parts, under their names in the trained attention.
        num_heads: attention heads.
        runtime: of the converted network.
    """

    def __init__(self, parts: dict[str, nn.Module], num_heads: int, runtime: Runtime) -> None:
        super().__init__()
        self.neuron, self.proj, self.attn_neuron = parts["neuron"], parts["proj"], parts["attn_neuron"]
        self.q_proj, self.k_proj, self.v_proj = (parts[f"{n}_proj"] for n in "qkv")
        self.q_neuron, self.k_neuron, self.v_neuron = (parts[f"{n}_neuron"] for n in "qkv")
        self.num_heads, self.runtime = num_heads, runtime

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream ``[B or T * B, C, H, W]`` to the branch that is added to it."""
        spikes = self.neuron(x)
        query = self.q_neuron(self.q_proj(spikes))
        key = self.k_neuron(self.k_proj(spikes))
        value = self.v_neuron(self.v_proj(spikes))
        shape = query.shape
        heads = [t.reshape(shape[0], self.num_heads, -1, shape[2] * shape[3]) for t in (query, key, value)]
        if self.runtime.mode == "step":
            product = self._step(*(self.runtime.split(t) for t in heads))
        elif self.runtime.mode == "trace":
            arrival = max(t.arrival for t in (query, key, value)) + self.runtime.time_steps - 1
            product = linear_attention(*(plain(t) for t in heads)).reshape(shape)
            product = TracedTensor.mark(product, None, arrival)
        else:
            product = linear_attention(*heads)
        return self.proj(self.attn_neuron(product.reshape(shape)))

    def _step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Binary ``[T, B, heads, d_h, N]`` each, to currents ``[T, B, heads, d_h, N]``."""
        key_sum, value_sum = torch.zeros_like(key[0]), torch.zeros_like(value[0])
        total = key.new_zeros(*key.shape[1:-1], key.shape[-2])
        for k, v in zip(key, value):
            increment, key_sum, value_sum = outer_increment(k, v, key_sum, value_sum)
            total = total + increment
        return torch.stack([total @ q for q in query])
