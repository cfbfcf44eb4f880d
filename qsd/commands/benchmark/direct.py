"""A baseline: direct training of leaky neurons over time, on the same skeleton."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from qsd.commands.benchmark.settings import with_one_output
from qsd.neurons import SpikeNeuron


class LeakyIntegrateAndFire(nn.Module):
    """The neuron of direct training, unrolled over ``[T * B, ...]``; it is a baseline to measure against.

    Args:
        time_steps: T.
        threshold: The membrane potential at which the neuron fires.
        amplitude: The amplitude of a spike.
    """

    def __init__(self, time_steps: int, threshold: float, amplitude: float) -> None:
        super().__init__()
        self.time_steps, self.threshold, self.amplitude = time_steps, threshold, amplitude

    def step_size(self, features: int) -> float:
        """The value of a spike, which CSDformer's attention takes from its neurons."""
        del features
        return self.threshold

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Currents to binary spikes times the amplitude; half of the membrane leaks, a spike takes the threshold."""
        currents = (x * scale if scale != 1 else x).unflatten(0, (self.time_steps, -1))
        membrane, spikes = torch.zeros_like(currents[0]), []
        for current in currents:
            membrane = membrane / 2 + current
            spike = RectangularSpike.apply(membrane / self.threshold)
            membrane = membrane - spike * self.threshold
            spikes.append(spike)
        return torch.cat(spikes) * self.amplitude


class RectangularSpike(torch.autograd.Function):
    """Fire at 1; the surrogate gradient is 1 in a window of width 1 around that."""

    @staticmethod
    def forward(ctx: Any, membrane: Tensor) -> Tensor:
        ctx.save_for_backward((membrane - 1).abs() < 0.5)
        return (membrane >= 1).to(membrane.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (window,) = ctx.saved_tensors
        return grad * window


class DirectlyTrained(nn.Module):
    """The skeleton of a registered network with leaky neurons; all layers run T times.

    Args:
        name: The registered name of the network.
        time_steps: T.
        arguments: Further arguments of the network.
    """

    def __init__(self, name: str, time_steps: int, **arguments: Any) -> None:
        super().__init__()
        self.time_steps = time_steps
        self.network = with_one_output(timm.create_model(name, time_steps=1, **arguments))
        for module in list(self.network.modules()):
            for key, child in module.named_children():
                if isinstance(child, SpikeNeuron):
                    setattr(module, key, LeakyIntegrateAndFire(time_steps, child.threshold, child.amplitude))

    def forward(self, images: Tensor) -> Tensor:
        """The mean of the logits over the time steps."""
        logits: Tensor = self.network(images.repeat(self.time_steps, 1, 1, 1))
        return logits.unflatten(0, (self.time_steps, -1)).mean(0)
