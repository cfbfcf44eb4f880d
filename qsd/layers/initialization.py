"""Setting the learned steps of neurons from data."""

from typing import Any

import torch
from torch import Tensor, nn

from qsd.layers.recompute import frozen_statistics
from qsd.neurons import LsqNeuron


@torch.no_grad()
def initialize_neurons(model: nn.Module, images: Tensor) -> int:
    """Set the step of every LSQ neuron from the statistics of a batch: ``2 * mean|x| / sqrt(T)``.

    The network is run once as in training, and every neuron's step is set before the neuron fires, so that those
    behind see its quantized output. Running statistics of batch norms stay as they are. Call it once, before
    quantization-aware training; the task does so with its first batch.

    Args:
        model: any module.
        images: a batch of training images ``[B, C, H, W]``.

    Returns:
        The number of neurons whose step was set.
    """

    def initialize(neuron: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(neuron, LsqNeuron)
        neuron.initialize(*inputs)

    neurons = [module for module in model.modules() if isinstance(module, LsqNeuron)]
    if not neurons:
        return 0
    was_training = {module: module.training for module in model.modules()}
    handles = [neuron.register_forward_pre_hook(initialize) for neuron in neurons]
    try:
        # A compiled forward would keep the hooks.
        with frozen_statistics(model), torch.compiler.set_stance("force_eager"):
            model.train()(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was_training.items():
            module.training = training
    return len(neurons)
