"""Chains of convolutions as one convolution."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.layers import BatchNormPad2d, LayerScale, LinearChain, QuantConv2d, quantized_weight
from qsd.spiking.layers import Convolution

# Chains that become one convolution in time steps: all, none, those with a frame (RepConv) or those without (SepConv).
MergeChoice = Literal["all", "none", "rep", "sep"]
Merge = bool | MergeChoice


def merge_choice(merge: Merge) -> MergeChoice:
    """The choice of chains to merge by its name.

    Args:
        merge: A choice; True and False stand for ``"all"`` and ``"none"``.

    Raises:
        QsdError: If it is unknown.
    """
    if isinstance(merge, bool):
        return "all" if merge else "none"
    if merge not in get_args(MergeChoice):
        raise QsdError(f"merge={merge!r} is unknown; use 'all', 'none', 'rep' or 'sep'.")
    return merge


def check_merge(merge: Merge, merged_bits: int | None) -> None:
    """Refuse a choice that cannot be merged.

    Args:
        merge: As in `to_spike_driven`.
        merged_bits: As in `to_spike_driven`.

    Raises:
        QsdError: If one of them, or both together, cannot be.
    """
    if merge_choice(merge) == "none" and merged_bits is not None:
        raise QsdError("merged_bits needs merged kernels; leave merge='all'.")
    if merged_bits is not None and not 2 <= merged_bits <= 16:
        raise QsdError(f"merged_bits={merged_bits} is not from 2 to 16.")


def fold_norms(chain: LinearChain, name: str) -> dict[str, Convolution]:
    """The convolutions of a chain in evaluation, by name, batch norms folded into them.

    Args:
        chain: Trained chain.
        name: Dotted name of the chain, for error messages.

    Raises:
        QsdError: If the chain holds another kind of layer, or begins with a norm.
    """
    factors: dict[str, Convolution] = {}
    last = ""
    for key, layer in chain.named_children():
        if isinstance(layer, QuantConv2d):
            last, factors[key] = key, single_factor(layer)
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


def single_factor(layer: QuantConv2d) -> Convolution:
    """A convolution with its quantized weight.

    Args:
        layer: Trained convolution.
    """
    weight = quantized_weight(layer).detach().clone()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()
    stride, padding = layer.stride[0], layer.padding[0]
    assert isinstance(padding, int)
    return Convolution(weight, bias, stride, padding, layer.groups)


def _scaled(factor: Convolution, scale: Tensor) -> Convolution:
    weight = factor.weight * scale.view(-1, 1, 1, 1)
    return Convolution(weight, factor.bias * scale, factor.stride, factor.padding, factor.groups, factor.frame)


def merge_factors(factors: Sequence[Convolution], name: str) -> Convolution:
    """One dense convolution that equals a chain of them, borders included.

    Exact where at most one factor has a kernel larger than a pixel and the factors in front of it either have no bias
    or are framed by their response to zeros. Computed in float64.

    Args:
        factors: Convolutions in the order of application.
        name: Name of the chain, for error messages.

    Raises:
        QsdError: If no single convolution equals them.
    """
    large = [i for i, factor in enumerate(factors) if factor.weight.shape[-1] > 1]
    at = large[0] if large else len(factors) - 1
    before, core, after = factors[:at], factors[at], factors[at + 1 :]
    _check_single(before, core, len(large), factors, name)
    inputs = before[0].weight.shape[1] * before[0].groups if before else core.weight.shape[1] * core.groups
    # The factors in front act on each pixel alone: as one matrix [C, C_in] and one offset [C].
    channels = torch.eye(inputs, dtype=torch.float64, device=core.weight.device)
    offset = channels.new_zeros(inputs)
    for factor in before:
        pointwise = dense_kernel(factor)[:, :, 0, 0]
        channels, offset = pointwise @ channels, pointwise @ offset + factor.bias.double()
    split = core.weight.double().unflatten(0, (core.groups, -1))  # [G, C_out / G, C_in / G, k, k]
    kernel = torch.einsum("gockl,gci->goikl", split, channels.unflatten(0, (core.groups, -1))).flatten(0, 1)
    constant = torch.einsum("gockl,gc->go", split, offset.unflatten(0, (core.groups, -1))).flatten()
    bias, stride = constant + core.bias.double(), core.stride
    for factor in after:
        pointwise = dense_kernel(factor)[:, :, 0, 0]
        kernel = torch.einsum("om,mikl->oikl", pointwise, kernel)
        bias = pointwise @ bias + factor.bias.double()
        stride *= factor.stride
    framed = bool(before) and before[-1].frame is not None
    return Convolution(kernel.to(core.weight.dtype), bias.to(core.weight.dtype), stride, core.padding + framed)


def _check_single(
    before: Sequence[Convolution], core: Convolution, large: int, factors: Sequence[Convolution], name: str
) -> None:
    """Refuse a chain that no single convolution equals."""
    frame = before[-1].frame if before else None
    silent = all(not bool(factor.bias.any()) for factor in before)
    exact_border = core.padding == 0 or (silent and frame is None)
    inner_frames = [f for f in factors if f.frame is not None and not (frame is not None and f is before[-1])]
    if large > 1 or inner_frames or not exact_border or any(f.stride > 1 or f.padding for f in before):
        raise QsdError(f"chain {name} is no single convolution; convert it with merge='none'.")
    if frame is not None and not torch.allclose(frame, before[-1].bias):
        raise QsdError(f"the frame of chain {name} is not its response to zeros; convert it with merge='none'.")


def dense_kernel(factor: Convolution) -> Tensor:
    """Kernel of an equal convolution with one group, float64 ``[C_out, C_in, k, k]``.

    Args:
        factor: Convolution with any number of groups.
    """
    weight = factor.weight.double()
    if factor.groups == 1:
        return weight
    blocks = weight.unflatten(0, (factor.groups, -1))
    dense = weight.new_zeros(*blocks.shape[:2], factor.groups, *blocks.shape[2:])
    index = torch.arange(factor.groups)
    dense[index, :, index] = blocks
    return dense.flatten(2, 3).flatten(0, 1)
