"""How each type of layer is converted. A new layer type registers a rule; the engine stays as it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.layers import (
    BatchNormPad2d,
    LayerScale,
    LinearChain,
    MatrixProduct,
    QuantConv2d,
    QuantLinear,
    SpikeProduct,
    TokenMean,
    TokenMeanLinear,
    quantized_weight,
)
from qsd.neurons import FloatNeuron, LearnedStepNeuron, SpikeNeuron
from qsd.spiking.layers import (
    Convolution,
    DelayedNeuron,
    SpikingChain,
    SpikingDense,
    SpikingMaxPool,
    SpikingPooledDense,
    SpikingProduct,
    SpikingQuery,
)
from qsd.spiking.runtime import Runtime

Merge = bool | Literal["rep", "sep"]


def check_merge(merge: Merge, merged_bits: int | None) -> None:
    """Refuse what cannot be merged.

    Args:
        merge: as in `to_spike_driven`.
        merged_bits: as in `to_spike_driven`.

    Raises:
        QsdError: if one of them, or both together, cannot be.
    """
    if merge not in (True, False, "rep", "sep"):
        raise QsdError(f"merge={merge!r} is unknown; use True, False, 'rep' or 'sep'.")
    if merged_bits is not None and merge is False:
        raise QsdError("merged_bits needs merged kernels; leave merge=True.")
    if merged_bits is not None and not 2 <= merged_bits <= 16:
        raise QsdError(f"merged_bits={merged_bits} is not from 2 to 16.")


@dataclass
class Conversion:
    """One conversion in progress, as a rule sees it.

    Attributes:
        runtime: of the new network.
        delay: delay of a neuron, by its dotted name.
        merge: which chains become one convolution in steps: all, none, those with a frame (``"rep"``) or without.
        merged_counts: merged kernels will be quantized, so that the count domain has to use them too.
    """

    runtime: Runtime
    delay: Callable[[str], int]
    merge: Merge = True
    merged_counts: bool = False

    def convert(self, module: nn.Module, name: str) -> nn.Module:
        """The spiking counterpart of a module, by the rule of its type, or part by part.

        Args:
            module: part of the trained model.
            name: its dotted name.

        Raises:
            QsdError: for a layer without a rule.
        """
        rule = next((RULES[kind] for kind in type(module).__mro__ if kind in RULES), None)
        if rule is not None:
            return rule(module, name, self)
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
    `Conversion`, and returns the spiking module.

    Args:
        types: module types.
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(types, rule))
        return rule

    return register


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
    return DelayedNeuron(module, name, conversion.delay(name), conversion.runtime)


@register_conversion(LearnedStepNeuron)
def _learned_neuron(module: LearnedStepNeuron, name: str, conversion: Conversion) -> nn.Module:
    # What was learned is fixed now.
    fixed = SpikeNeuron(module.time_steps, module.threshold, module.amplitude)
    return DelayedNeuron(fixed, name, conversion.delay(name), conversion.runtime)


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
    if len(factors) > 1 and conversion.merge in (True, kind):
        merged = merge_factors(list(factors.values()), name)
    return SpikingChain(factors, merged, conversion.merged_counts, name, conversion.runtime)


@register_conversion(QuantConv2d)
def _conv(module: QuantConv2d, name: str, conversion: Conversion) -> nn.Module:
    return SpikingChain({"conv": _factor(module)}, None, False, name, conversion.runtime)


@register_conversion(QuantLinear)
def _dense(module: QuantLinear, name: str, conversion: Conversion) -> SpikingDense:
    weight = quantized_weight(module).detach().clone()
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().clone()
    return SpikingDense(weight, bias, name, conversion.runtime)


@register_conversion(TokenMeanLinear)
def _pooled_dense(module: TokenMeanLinear, name: str, conversion: Conversion) -> nn.Module:
    dense = _dense(module, name, conversion)
    return SpikingPooledDense(dense.weight, dense.bias, name, conversion.runtime)


# -- folding and merging ----------------------------------------------------------------------------------------------


def fold_norms(chain: LinearChain, name: str) -> dict[str, Convolution]:
    """The convolutions of a chain in evaluation, by name, batch norms folded into them.

    Args:
        chain: trained.
        name: its dotted name, for errors.

    Raises:
        QsdError: if the chain holds something else, or begins with a norm.
    """
    factors: dict[str, Convolution] = {}
    last = ""
    for key, layer in chain.named_children():
        if isinstance(layer, QuantConv2d):
            last, factors[key] = key, _factor(layer)
        elif (
            isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm | BatchNormPad2d)
            and factors
            and factors[last].frame is None
        ):
            norm = layer.norm if isinstance(layer, BatchNormPad2d) else layer
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
            factor = _scaled(factors[last], scale)
            factor.bias = factor.bias + norm.bias.detach() - norm.running_mean * scale
            factor.frame = layer.frame() if isinstance(layer, BatchNormPad2d) else None
            factors[last] = factor
        elif isinstance(layer, LayerScale) and factors and factors[last].frame is None:
            factors[last] = _scaled(factors[last], layer.gamma.detach())
        else:
            raise QsdError(
                f"layer {name}.{key} ({type(layer).__name__}) cannot stand there in a chain of convolutions."
            )
    if not factors:
        raise QsdError(f"layer {name} is an empty chain.")
    return factors


def _factor(layer: QuantConv2d) -> Convolution:
    weight = quantized_weight(layer).detach().clone()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()
    stride, padding = layer.stride[0], layer.padding[0]
    assert isinstance(padding, int)
    return Convolution(weight, bias, stride, padding, layer.groups)


def _scaled(factor: Convolution, scale: Tensor) -> Convolution:
    weight = factor.weight * scale.view(-1, 1, 1, 1)
    return Convolution(weight, factor.bias * scale, factor.stride, factor.padding, factor.groups, factor.frame)


def merge_factors(factors: list[Convolution], name: str) -> Convolution:
    """One dense convolution that equals a chain of them, borders included.

    Exact where at most one factor has a kernel larger than a pixel and what lies before it either has no bias or is
    framed by what it makes of zeros. Computed in float64.

    Args:
        factors: convolutions in the order of application.
        name: of the chain, for errors.

    Raises:
        QsdError: if no single convolution equals them.
    """
    large = [i for i, factor in enumerate(factors) if factor.weight.shape[-1] > 1]
    before = factors[: large[0]] if large else factors[:-1]
    core = factors[large[0]] if large else factors[-1]
    frame = before[-1].frame if before else None
    framed = frame is not None
    padding = core.padding + (1 if framed else 0)
    silent = all(not bool(f.bias.any()) for f in before)
    exact_border = core.padding == 0 or (silent and not framed)
    inner_frames = [f for f in factors if f.frame is not None and not (framed and f is before[-1])]
    if len(large) > 1 or inner_frames or not exact_border or any(f.stride > 1 or f.padding for f in before):
        raise QsdError(f"chain {name} is no single convolution; convert it with merge=False.")
    if frame is not None and not torch.allclose(frame, before[-1].bias):
        raise QsdError(f"the frame of chain {name} is not what it makes of zeros; convert it with merge=False.")
    dtype = core.weight.dtype
    inputs = before[0].weight.shape[1] * before[0].groups if before else core.weight.shape[1] * core.groups
    channels = torch.eye(inputs, dtype=torch.float64, device=core.weight.device)  # [C, C_in]
    offset = channels.new_zeros(inputs)
    for factor in before:
        pointwise = _dense_kernel(factor)[:, :, 0, 0]
        channels, offset = pointwise @ channels, pointwise @ offset + factor.bias.double()
    split = core.weight.double().unflatten(0, (core.groups, -1))  # [G, C_out / G, C_in / G, k, k]
    kernel = torch.einsum("gockl,gci->goikl", split, channels.unflatten(0, (core.groups, -1))).flatten(0, 1)
    constant = torch.einsum("gockl,gc->go", split, offset.unflatten(0, (core.groups, -1))).flatten()
    bias = constant + core.bias.double()
    stride = core.stride
    for factor in factors[large[0] + 1 :] if large else []:
        pointwise = _dense_kernel(factor)[:, :, 0, 0]
        kernel = torch.einsum("om,mikl->oikl", pointwise, kernel)
        bias = pointwise @ bias + factor.bias.double()
        stride *= factor.stride
    return Convolution(kernel.to(dtype), bias.to(dtype), stride, padding)


def _dense_kernel(factor: Convolution) -> Tensor:
    """Kernel without groups, float64 ``[C_out, C_in, k, k]``."""
    weight = factor.weight.double()
    if factor.groups == 1:
        return weight
    blocks = weight.unflatten(0, (factor.groups, -1))
    dense = weight.new_zeros(*blocks.shape[:2], factor.groups, *blocks.shape[2:])
    index = torch.arange(factor.groups)
    dense[index, :, index] = blocks
    return dense.flatten(2, 3).flatten(0, 1)
