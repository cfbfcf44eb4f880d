"""Synapses: linear maps of spikes to currents."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsd.errors import QsdError
from qsd.functional import pad_frame
from qsd.spiking.clock import Window
from qsd.spiking.layers.base import TimedLayer
from qsd.spiking.layers.costs import LayerInputs, Operations, synaptic_operations
from qsd.spiking.layers.geometry import Geometry, dense_macs, fan_out
from qsd.spiking.layers.linear_movement import Factor, linear_movement
from qsd.spiking.layers.movement import FLOAT_BITS, Movement
from qsd.spiking.layers.spike_movement import mean_movement
from qsd.spiking.runtime import Runtime
from qsd.spiking.steps import shift


class Convolution(nn.Module):
    """One linear factor of a chain, with norms folded in.

    Args:
        weight: ``[C_out, C_in / groups, k, k]``.
        bias: ``[C_out]``.
        stride: Stride of the kernel.
        padding: Pixels of zeros around the input.
        groups: Groups of channels.
        frame: Value by channel ``[C_out]`` of one pixel put around the output, or ``None`` for no frame.
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

    @property
    def geometry(self) -> Geometry:
        """The shape of the convolution."""
        channels, inputs, kernel, _ = self.weight.shape
        return Geometry(
            channels, inputs, kernel, self.stride, self.padding, self.groups, 0 if self.frame is None else 1
        )

    def stored_bits(self, width: int) -> float:
        """Bits of the weights, of one scale and one bias by output channel, and of the frame.

        Args:
            width: Bits of a weight.
        """
        return self.weight.numel() * width + FLOAT_BITS * self.vectors * len(self.bias)

    @property
    def vectors(self) -> int:
        """Numbers that are stored for each output channel: scale, bias, and value of the frame."""
        return 2 if self.frame is None else 3

    def quantize(self, bits: int, dtype: torch.dtype) -> None:
        """Round the weights to integers times a scale by output channel (symmetric).

        Args:
            bits: Bits of the integers.
            dtype: Type in which the scale has to be exact, so that the weights can be rebuilt in that type.
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
            scale: Value of one unit of the integers, ``[C_out]``.
            bias: ``[C_out]``.
        """
        self.scale = scale.to(self.weight)
        self.weight = integers.to(self.weight) * self.scale.view(-1, 1, 1, 1)
        self.bias = bias.to(self.weight)

    def forward(self, x: Tensor, share: float = 1.0) -> Tensor:
        """Convolve ``[B, C_in, H, W]``, with a share of bias and frame.

        Args:
            x: Input.
            share: 1 in the count domain, less in a step: over a window both are added once.
        """
        y = F.conv2d(x, self.weight, self.bias * share, self.stride, self.padding, groups=self.groups)
        return y if self.frame is None else pad_frame(y, self.frame * share)


class SpikingLinear(TimedLayer):
    """A synapse: linear map from spikes to currents.

    Its bias is injected in shares that add up to 1, in the unary code in T equal ones. The current of a spike is
    shifted by the spike's places.

    Subclasses implement `linear_map`, `absorb`, `operations` (`synaptic_operations` helps) and `stored_bits`.
    """

    role = "synapse"

    @abstractmethod
    def linear_map(self, x: Tensor, share: float) -> Tensor:
        """Apply the layer with a share of its bias.

        Args:
            x: Spikes, counts, or an image.
            share: Share of the bias.
        """
        raise NotImplementedError

    @abstractmethod
    def absorb(self, amplitude: float) -> None:
        """Multiply the weights that spikes meet by the amplitude of the spikes.

        Args:
            amplitude: Value of one incoming spike.
        """
        raise NotImplementedError

    def check_sources(self, *inputs: Tensor) -> None:
        source = getattr(inputs[0], "source", None)
        if self.runtime.sources.setdefault(self.name, source) is not source:
            raise QsdError(f"layer {self.name} is used twice, on different neurons' spikes; make it two layers.")

    def count(self, *inputs: Tensor) -> Tensor:
        return self.linear_map(inputs[0], 1.0)

    def step(self, constant: bool, *inputs: Tensor) -> Tensor:
        (x,), (code,) = inputs, self.codes
        if constant:  # The current depends on no spike, and is computed once.
            return code.spread(self.linear_map(x, 1.0))
        return code.currents(self.linear_map, x)

    def tick(self, window: Window, *inputs: Tensor) -> Tensor:
        (x,), (code,), step = inputs, self.codes, window.step
        if not window.open:
            return self.linear_map(torch.zeros_like(x), 0.0)
        if window.constant:
            return code.part(self.linear_map(x, 1.0), step)
        return shift(self.linear_map(x, code.share(step)), code.places(step))


class SpikingChain(SpikingLinear):
    """A chain of convolutions, as factors and perhaps merged into one.

    The count domain evaluates the factors. Steps use the merged kernel where there is one: equal, but every synaptic
    operation then sees spikes.

    Args:
        factors: Convolutions by name, in the order of application.
        merged: One convolution equal to them, or ``None``.
        merged_counts: Whether the count domain evaluates the merged one too (if it is not equal: quantized).
        name: Dotted name in the trained model.
        runtime: Runtime of the converted network.
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

    def part_name(self, part: nn.Module) -> str:
        inner = self.convolutions if len(self.factors) > 1 else {}
        key = next((key for key, convolution in inner.items() if convolution is part), None)
        return self.name if key is None else f"{self.name}.{key}"

    def operations(self, inputs: LayerInputs) -> Operations:
        (x,) = inputs.tensors
        height, width = x.shape[-2:]
        factors = [factor.geometry for factor in self.convolutions.values()]
        # Counted for both forms, whichever of them the network has.
        first = {"merged": Geometry.merged(factors), "unmerged": factors[0]}
        return synaptic_operations(
            inputs,
            lambda key: fan_out((height, width), first[key]).to(x.device),
            dense_macs(factors, height, width),
            sum(dense_macs([first["merged"]], height, width)),
        )

    def kernels(self) -> list[Tensor]:
        return [factor.weight for factor in self.convolutions.values()] if self.merged is None else [self.merged.weight]

    def stored_bits(self, weight_bits: Mapping[str, int], merged_bits: int | None) -> float:
        if self.merged is not None:
            return self.merged.stored_bits(merged_bits or FLOAT_BITS)
        widths = self._weight_bits(weight_bits)
        return sum(factor.stored_bits(widths[key]) for key, factor in self.convolutions.items())

    def _weight_bits(self, weight_bits: Mapping[str, int]) -> dict[str, int]:
        """Bits of the weights of each factor."""
        own = weight_bits.get(f"{self.name}.weight", FLOAT_BITS)  # A single convolution has the chain's name.
        return {key: weight_bits.get(f"{self.name}.{key}.weight", own) for key in self.convolutions}

    def movement(self, inputs: LayerInputs, output: Tensor, operations: Operations | None) -> Movement:
        assert operations is not None
        height, width = inputs.tensors[0].shape[-2:]
        bits, factors = self._weight_bits(inputs.weight_bits), []
        for key, convolution in self.convolutions.items():
            shape = convolution.geometry
            factors.append(Factor.of_convolution(shape, height, width, bits[key], convolution.vectors))
            height, width = (shape.size(side) + 2 * shape.frame for side in (height, width))
        merged = factors
        if len(factors) > 1:
            kernel = Geometry.merged([convolution.geometry for convolution in self.convolutions.values()])
            rows, columns = inputs.tensors[0].shape[-2:]
            merged = [Factor.of_convolution(kernel, rows, columns, inputs.merged_bits or FLOAT_BITS)]
        return linear_movement(inputs, operations, {"merged": merged, "unmerged": factors})


class SpikingDense(SpikingLinear):
    """A fully connected layer, such as the classifier.

    Args:
        weight: ``[C_out, C_in]``.
        bias: ``[C_out]``.
        name: Dotted name in the trained model.
        runtime: Runtime of the converted network.
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

    def operations(self, inputs: LayerInputs) -> Operations:
        return synaptic_operations(inputs, self._fan_out, [float(self._positions(inputs) * self.weight.numel())])

    def _fan_out(self, _network: str) -> Tensor:
        return torch.tensor(len(self.weight))

    def _positions(self, inputs: LayerInputs) -> int:
        (x,) = inputs.tensors
        return x[0].numel() // x.shape[-1]

    def stored_bits(self, weight_bits: Mapping[str, int], merged_bits: int | None) -> float:
        del merged_bits
        width = weight_bits.get(f"{self.name}.weight", FLOAT_BITS)
        return self.weight.numel() * width + FLOAT_BITS * 2 * len(self.bias)

    def _factor(self, inputs: LayerInputs, positions: float) -> Factor:
        """The layer as it is applied to so many positions."""
        classes, features = self.weight.shape
        width = inputs.weight_bits.get(f"{self.name}.weight", FLOAT_BITS)
        macs = positions * self.weight.numel()
        sums, reach = positions * classes, float(classes)
        return Factor(positions * features, sums, macs, width, self.weight.numel(), classes, 2, reach, reach)

    def movement(self, inputs: LayerInputs, output: Tensor, operations: Operations | None) -> Movement:
        assert operations is not None
        factors = [self._factor(inputs, self._positions(inputs))]
        return linear_movement(inputs, operations, {"merged": factors, "unmerged": factors})


class SpikingPooledDense(SpikingDense):
    """A classifier of the mean over positions: spikes ``[B, C, H, W]`` to ``[B, C_out]``.

    The mean's 1/N lies in the weights, so that every spike of every position adds a column of them.
    """

    def linear_map(self, x: Tensor, share: float) -> Tensor:
        spikes, positions = x.flatten(2), x.shape[2] * x.shape[3]
        if self.runtime.mode in ("count", "trace"):  # the same, in fewer operations
            return F.linear(spikes.sum(2), self.weight / positions, self.bias * share)
        currents = F.linear(spikes.transpose(1, 2), self.weight / positions)
        return currents.sum(1) + self.bias * share

    def operations(self, inputs: LayerInputs) -> Operations:
        found = super().operations(inputs)
        # Numbers are averaged first, and their means are hardly ever zero.
        return replace(found, nonzero=inputs.images * self.weight.shape[1], effective=None)

    def _positions(self, inputs: LayerInputs) -> int:
        del inputs
        return 1  # Where numbers are multiplied, the mean is taken first.

    def movement(self, inputs: LayerInputs, output: Tensor, operations: Operations | None) -> Movement:
        assert operations is not None
        (x,) = inputs.tensors
        dense = self._factor(inputs, 1)
        spiking = replace(dense, inputs=inputs.size(x), macs=inputs.size(x) * dense.outputs)
        means = replace(inputs, signals=(inputs.signal().times(x.shape[2] * x.shape[3]),))
        of_spikes = linear_movement(means, operations, {"merged": [spiking], "unmerged": [spiking]})
        of_means = linear_movement(means, operations, {"merged": [dense], "unmerged": [dense]})
        parts = dict(of_spikes.parts)
        summed = mean_movement(inputs, x, float(x.shape[1]))
        for network in ("integer", "float_twin"):
            parts[network] = [*summed.parts[network], *of_means.parts[network]]
        return Movement(parts, of_spikes.output, of_spikes.words)
