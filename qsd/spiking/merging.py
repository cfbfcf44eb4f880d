"""Chains of convolutions as one convolution."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.layers import BatchNormPad2d, LayerScale, LinearChain, QuantConv2d, quantized_weight
from qsd.spiking.layers import Convolution
from qsd.spiking.layers.geometry import Padding, pair

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
            last, factors[key] = key, single_factor(layer, f"{name}.{key}")
        elif (
            isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm | BatchNormPad2d)
            and factors
            and factors[last].frame is None
        ):
            factor = _normalized(factors[last], layer, f"{name}.{key}")
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


def single_factor(layer: QuantConv2d, name: str) -> Convolution:
    """A convolution with its quantized weight.

    Args:
        layer: Trained convolution.
        name: Dotted name of the layer, for error messages.

    Raises:
        QsdError: If it is padded with something else than zeros.
    """
    if layer.padding_mode != "zeros":
        raise QsdError(
            f"layer {name} has padding_mode={layer.padding_mode!r}, which repeats spikes in its border; train it with "
            "padding_mode='zeros'."
        )
    weight = quantized_weight(layer).detach().clone()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()
    return Convolution(weight, bias, layer.stride, _padding(layer), layer.groups, None, layer.dilation)


def _padding(layer: QuantConv2d) -> Padding:
    if layer.padding == "valid":
        return 0
    if layer.padding == "same":
        totals = [dilation * (kernel - 1) for dilation, kernel in zip(layer.dilation, layer.kernel_size)]
        upright, across = ((total // 2, total - total // 2) for total in totals)
        return upright, across
    assert not isinstance(layer.padding, str)
    return pair(layer.padding)


def _normalized(factor: Convolution, layer: nn.Module, name: str) -> Convolution:
    """A convolution with the batch norm behind it folded in."""
    norm: Any = layer.norm if isinstance(layer, BatchNormPad2d) else layer
    if norm.running_mean is None or norm.running_var is None:
        raise QsdError(
            f"layer {name} is a batch norm without running statistics, which normalises by each batch; train it with "
            "track_running_stats=True."
        )
    scale = (1 if norm.weight is None else norm.weight.detach()) / torch.sqrt(norm.running_var + norm.eps)
    normalized = _scaled(factor, scale)
    bias = normalized.bias if norm.bias is None else normalized.bias + norm.bias.detach()
    normalized.bias = bias - norm.running_mean * scale
    return normalized


def _scaled(factor: Convolution, scale: Tensor) -> Convolution:
    weight, bias = factor.weight * scale.view(-1, 1, 1, 1), factor.bias * scale
    return Convolution(weight, bias, factor.stride, factor.padding, factor.groups, factor.frame, factor.dilation)


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
    large = [i for i, factor in enumerate(factors) if _is_large(factor)]
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
        stride = stride[0] * factor.stride[0], stride[1] * factor.stride[1]
    frame = 1 if before and before[-1].frame is not None else 0
    height, width = ((first + frame, last + frame) for first, last in core.padding)
    dtype = core.weight.dtype
    return Convolution(kernel.to(dtype), bias.to(dtype), stride, (height, width), dilation=core.dilation)


def _is_large(factor: Convolution) -> bool:
    return max(factor.weight.shape[-2:]) > 1


def _is_padded(factor: Convolution) -> bool:
    return any(map(any, factor.padding))


def _check_single(
    before: Sequence[Convolution], core: Convolution, large: int, factors: Sequence[Convolution], name: str
) -> None:
    """Refuse a chain that no single convolution equals."""
    after = factors[len(before) + 1 :]
    frame = before[-1].frame if before else None
    silent = all(not bool(factor.bias.any()) for factor in before)
    exact_border = not _is_padded(core) or (silent and frame is None)
    pixelwise = all(max(f.stride) == 1 and not _is_padded(f) for f in before) and not any(map(_is_padded, after))
    inner_frames = [f for f in factors if f.frame is not None and not (frame is not None and f is before[-1])]
    if large > 1 or inner_frames or not exact_border or not pixelwise:
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
