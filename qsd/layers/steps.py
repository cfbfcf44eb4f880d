"""Step sizes of quantizers and neurons, found by the type of their owner."""

from torch import nn

from qsd.neurons import FloatNeuron, SpikeNeuron
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
