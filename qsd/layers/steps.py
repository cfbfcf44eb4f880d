"""Step sizes, the learned parameters of weight quantizers and of neurons: finding them and setting them from data."""

from typing import Any

import torch
from torch import Tensor, nn

from qsd.layers.recompute import frozen_statistics
from qsd.neurons import FloatNeuron, LearnedStepNeuron, SpikeNeuron
from qsd.quantizers import StepSizeQuantizer


def learned_steps(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learned steps of quantizers and neurons, by the dotted names of their modules.

    Args:
        model: Any module.
    """
    return {
        name: parameter
        for name, module in model.named_modules()
        if isinstance(module, StepSizeQuantizer | SpikeNeuron)
        for parameter in module.parameters(recurse=False)
    }


def step_names(model: nn.Module) -> set[str]:
    """The dotted names of all parameters that are step sizes: those that a quantizer or a neuron owns.

    Args:
        model: Any module.
    """
    return {
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if isinstance(module, StepSizeQuantizer | SpikeNeuron)
        for key, _ in module.named_parameters(recurse=False)
    }


def has_no_step(model: nn.Module, name: str) -> bool:
    """Whether a name is that of a step size which the model lacks because this part of it computes with floats.

    Args:
        model: Any module.
        name: Dotted name of a tensor that the model does not have.
    """
    owner = name.rpartition(".")[0]
    modules = dict(model.named_modules())
    if owner not in modules and owner.endswith(".quantizer"):
        return hasattr(modules.get(owner.removesuffix(".quantizer")), "quantizer")
    return isinstance(modules.get(owner), FloatNeuron | SpikeNeuron | nn.Identity)


def collapsed_step(model: nn.Module) -> tuple[str, float] | None:
    """The first quantizer or neuron with a step size that is not positive, and that step size.

    Args:
        model: Any module.
    """
    steps = learned_steps(model)
    if not steps:
        return None
    # One comparison for all: this runs after every step, and each comparison waits for the GPU.
    if bool((torch.cat([step.detach().flatten() for step in steps.values()]) > 0).all()):
        return None
    return next((name, step.min().item()) for name, step in steps.items() if not bool((step > 0).all()))


@torch.no_grad()
def initialize_neurons(model: nn.Module, images: Tensor) -> int:
    """Set the steps of neurons from the statistics of a batch, for LSQ neurons to ``2 * mean|x| / sqrt(T)``.

    The network is run once as in training, and every neuron's step is set before the neuron fires, so that later
    neurons see its quantized output. Running statistics of batch norms stay as they are. Call it once, before
    quantization-aware training; the task does so with its first batch.

    Args:
        model: Any module. Neurons of learned step that have a method ``initialize(x, scale=None)`` take part.
        images: A batch of training images ``[B, C, H, W]``.

    Returns:
        The number of neurons whose step was set.
    """

    def initialize(neuron: Any, inputs: tuple[Any, ...]) -> None:
        neuron.initialize(*inputs)

    neurons = [m for m in model.modules() if isinstance(m, LearnedStepNeuron) and hasattr(m, "initialize")]
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
