"""Spike counts of all neurons, by name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qsd.layers.integer_operands import has_counts_of_float32
from qsd.layers.wrappers import unwrapped
from qsd.neurons import SpikeNeuron
from qsd.precision import full_float32, warn_of_autocast
from qsd.spiking.names import call_names
from qsd.spiking.network import SpikingNetwork


@torch.no_grad()
@full_float32()
def count_spikes(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Spike counts of every neuron, from a trained network or a converted one (in the count domain).

    Args:
        model: A trained model, evaluated as it is, or a `SpikingNetwork`.
        images: ``[B, C, H, W]``.

    Returns:
        Integer-valued counts ``[B, ...]`` by the neurons' dotted names in the trained model; of a neuron that runs
        several times in a pass by ``name@0``, ``name@1``, ...
    """
    counts: dict[str, Tensor] = {}
    if isinstance(model, SpikingNetwork):
        with model.runtime.counting(counts):
            model(images)
        return counts
    model = unwrapped(model)
    if not has_counts_of_float32(model):
        warn_of_autocast(images.device.type)
    with watch_neurons(model, lambda neuron, *inputs: neuron.counts(*inputs)) as calls:
        model(images)
    return named_calls(calls)


@contextmanager
def watch_neurons(model: nn.Module, look: Callable[..., Any]) -> Iterator[list[tuple[str, Any]]]:
    """Call a function on every neuron of a trained model whenever it runs.

    Args:
        model: A trained model.
        look: Gets the neuron and its inputs.

    Yields:
        The neurons' names and the results, in the order of execution.
    """
    calls: list[tuple[str, Any]] = []

    def hook(name: str) -> Any:
        return lambda neuron, inputs, _output: calls.append((name, look(neuron, *inputs)))

    neurons = [(name, m) for name, m in model.named_modules() if isinstance(m, SpikeNeuron)]
    handles = [neuron.register_forward_hook(hook(name)) for name, neuron in neurons]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def named_calls(calls: list[tuple[str, Any]]) -> dict[str, Any]:
    """Results of `watch_neurons` in one pass, by the names that `call_names` makes.

    Args:
        calls: In the order of execution.
    """
    return dict(zip(call_names([name for name, _ in calls]), (result for _, result in calls)))
