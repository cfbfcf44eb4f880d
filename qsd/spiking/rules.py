"""Conversion rules: how each type of layer is converted. A layer type registers its rule; the engine stays as it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.layers import (
    LinearChain,
    MatrixProduct,
    QuantConv2d,
    QuantLinear,
    SpikeProduct,
    TokenMean,
    TokenMeanLinear,
    quantized_weight,
)
from qsd.layers.frames import EventCounts, FrameAxis, FrameMean
from qsd.neurons import FloatNeuron, LearnedStepNeuron, SpikeNeuron
from qsd.spiking.layers import (
    DelayedNeuron,
    HalfEvenNeuron,
    SpikingChain,
    SpikingDense,
    SpikingEvents,
    SpikingFrameAxis,
    SpikingFrameMean,
    SpikingMaxPool,
    SpikingPooledDense,
    SpikingProduct,
    SpikingQuery,
    TimedLayer,
    missing_parts,
)
from qsd.spiking.merging import MergeChoice, fold_norms, merge_factors, single_factor
from qsd.spiking.runtime import Runtime


@dataclass
class Conversion:
    """One conversion in progress, as a rule sees it.

    Attributes:
        runtime: Runtime of the new network.
        delay: Gives the delay of a neuron by its dotted name.
        merge: Chains that become one convolution in time steps: ``"all"``, ``"none"``, ``"rep"`` or ``"sep"``.
        merged_counts: Whether merged kernels will be quantized, so that the count domain has to use them too.
    """

    runtime: Runtime
    delay: Callable[[str], int]
    merge: MergeChoice = "all"
    merged_counts: bool = False

    def convert(self, module: nn.Module, name: str) -> nn.Module:
        """The spiking counterpart of a module, by the rule of its type, or part by part.

        Args:
            module: Part of the trained model.
            name: Dotted name of the part.

        Raises:
            QsdError: For a layer without a rule, or a rule whose layer lacks something.
        """
        rule = next((RULES[kind] for kind in type(module).__mro__ if kind in RULES), None)
        if rule is not None:
            converted = rule(module, name, self)
            _check_layer(converted, name)
            return converted
        own = [key for key, _ in module.named_parameters(recurse=False)]
        children = dict(module.named_children())
        if own or not (children or isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)):
            what = f"owns the parameter {own[0]!r}" if own else "is no layer of qsd"
            raise QsdError(
                f"layer {name or 'the model'} ({type(module).__name__}) {what} and cannot be converted; build it from "
                f"qsd.layers, or register a rule with qsd.spiking.register_conversion({type(module).__name__})."
            )
        for key, child in children.items():
            setattr(module, key, self.convert(child, f"{name}.{key}" if name else key))
        return module


Rule = Callable[[Any, str, Conversion], nn.Module]
RULES: dict[type[nn.Module], Rule] = {}


def register_conversion(*types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Decorator: convert modules of these types (and subclasses without a rule of their own) by the function.

    The function gets the module (of a copy of the model, which it may take apart), its dotted name and the
    `Conversion`, and returns the spiking module: a `qsd.spiking.layers.TimedLayer`, or a module without weights that is
    linear in its input and can be applied to each time step alone.

    Args:
        types: Module types.
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(types, rule))
        return rule

    return register


def _check_layer(converted: nn.Module, name: str) -> None:
    """Refuse a rule's result that would convert and then fail in the audit, the energy or the size of the network."""
    inner = {id(part) for layer in converted.modules() if isinstance(layer, TimedLayer) for part in layer.modules()}
    for part in converted.modules():
        kind = type(part).__name__
        if isinstance(part, TimedLayer) and (missing := missing_parts(part)):
            raise QsdError(f"layer {name} was converted to a {kind}, which does not define {', '.join(missing)}.")
        if id(part) not in inner and (part._parameters or part._buffers):
            raise QsdError(
                f"layer {name} was converted to a {kind}, whose weights no audit or energy could see; let its rule "
                "return a subclass of qsd.spiking.layers.SpikingLinear."
            )


# Linear in their input and without weights: spikes or currents pass through, step by step.
@register_conversion(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.Upsample, TokenMean)
def _keep(module: nn.Module, name: str, conversion: Conversion) -> nn.Module:
    del name, conversion
    return module


@register_conversion(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
def _dropout(module: nn.Module, name: str, conversion: Conversion) -> nn.Module:
    del module, name, conversion
    return nn.Identity()


@register_conversion(FloatNeuron)
def _float_neuron(module: FloatNeuron, name: str, conversion: Conversion) -> nn.Module:
    del module, conversion
    raise QsdError(f"layer {name} is the ReLU of a float twin and fires no spikes; build its part with time_steps.")


@register_conversion(SpikeNeuron)
def _neuron(module: SpikeNeuron, name: str, conversion: Conversion) -> nn.Module:
    kind = HalfEvenNeuron if module.rule.half_even else DelayedNeuron
    return kind(module, name, conversion.delay(name), conversion.runtime)


@register_conversion(LearnedStepNeuron)
def _learned_neuron(module: LearnedStepNeuron, name: str, conversion: Conversion) -> nn.Module:
    # What was learned is fixed now.
    fixed = SpikeNeuron(module.time_steps, module.threshold, module.amplitude)
    fixed.memory = module.memory
    return DelayedNeuron(fixed, name, conversion.delay(name), conversion.runtime)


@register_conversion(EventCounts)
def _events(module: EventCounts, name: str, conversion: Conversion) -> nn.Module:
    return SpikingEvents(module, name, conversion.runtime)


@register_conversion(FrameAxis)
def _frame_axis(module: FrameAxis, name: str, conversion: Conversion) -> nn.Module:
    del name
    conversion.runtime.frames = module.passes
    return SpikingFrameAxis(module, conversion.runtime)


@register_conversion(FrameMean)
def _frame_mean(module: FrameMean, name: str, conversion: Conversion) -> nn.Module:
    del name
    return SpikingFrameMean(module.frames, conversion.runtime)


@register_conversion(nn.MaxPool2d)
def _max_pool(module: nn.MaxPool2d, name: str, conversion: Conversion) -> nn.Module:
    if module.return_indices:
        raise QsdError(f"max-pool {name} returns indices, which spikes do not have; use return_indices=False.")
    return SpikingMaxPool(module, name, conversion.runtime)


@register_conversion(SpikeProduct)
def _product(module: SpikeProduct, name: str, conversion: Conversion) -> nn.Module:
    del module
    return SpikingProduct(name, conversion.runtime)


@register_conversion(MatrixProduct)
def _matrix_product(module: MatrixProduct, name: str, conversion: Conversion) -> nn.Module:
    del module
    return SpikingQuery(name, conversion.runtime)


@register_conversion(LinearChain)
def _chain(module: LinearChain, name: str, conversion: Conversion) -> nn.Module:
    factors = fold_norms(module, name)
    kind = "rep" if any(factor.frame is not None for factor in factors.values()) else "sep"
    merged = None
    if len(factors) > 1 and conversion.merge in ("all", kind):
        merged = merge_factors(list(factors.values()), name)
    return SpikingChain(factors, merged, conversion.merged_counts, name, conversion.runtime)


@register_conversion(QuantConv2d)
def _conv(module: QuantConv2d, name: str, conversion: Conversion) -> nn.Module:
    return SpikingChain({"conv": single_factor(module, name)}, None, False, name, conversion.runtime)


@register_conversion(QuantLinear)
def _dense(module: QuantLinear, name: str, conversion: Conversion) -> nn.Module:
    return SpikingDense(*_weights(module), name, conversion.runtime)


@register_conversion(TokenMeanLinear)
def _pooled_dense(module: TokenMeanLinear, name: str, conversion: Conversion) -> nn.Module:
    return SpikingPooledDense(*_weights(module), name, conversion.runtime)


def _weights(module: QuantLinear) -> tuple[Tensor, Tensor]:
    """The quantized weight and the bias, zeros where there is none."""
    weight = quantized_weight(module).detach().clone()
    return weight, weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().clone()
