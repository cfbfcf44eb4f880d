"""Quantized layers with integer operands, see `qsd.operands`."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsd.layers.weights import weight_codes
from qsd.lean import has_hooks
from qsd.operands import EXACT_OPERAND, EXACT_SUM, Counts, convolved, largest_sum, operand_dtype, products
from qsd.precision import full_float32
from qsd.quantizers import StepSizeQuantizer


def integer_sums(layer: Any, counts: Counts) -> Tensor:
    """The layer as sums of integers in float32, times the product of amplitude and step sizes, plus the bias.

    Args:
        layer: `qsd.layers.QuantConv2d` or `qsd.layers.QuantLinear`, for which `is_exact` holds.
        counts: Its input.
    """
    x, quantizer = counts.values, layer.quantizer
    x = x.to(operand_dtype(x.device, counts.largest))
    codes = weight_codes(layer, x.dtype)
    # Larger operands are not exact in every format that PyTorch may shorten float32 to.
    wide = counts.largest > EXACT_OPERAND[torch.bfloat16]
    with full_precision(x) if wide else nullcontext(), torch.autocast(x.device.type, enabled=False):
        sums = _apply(layer, x, codes, None) if x.is_cpu else _as_matrices(layer, x, codes)
        scale, bias = quantizer.step * counts.amplitude, layer.bias
        if isinstance(layer, nn.Conv2d):
            scale = scale.view(-1, 1, 1)
            bias = None if bias is None else bias.view(-1, 1, 1)
        sums = sums.mul_(scale)
        return sums if bias is None else sums.add_(bias)


def is_exact(layer: Any, counts: Counts) -> bool:
    """Whether the sums of a layer are exact integers for all inputs, and all its parameters are float32.

    Args:
        layer: `qsd.layers.QuantConv2d` or `qsd.layers.QuantLinear`.
        counts: Its input.
    """
    quantizer = layer.quantizer
    if type(quantizer) is not StepSizeQuantizer or has_hooks(quantizer):
        return False
    if any(p.dtype != torch.float32 for p in (layer.weight, quantizer.step)):
        return False
    if counts.values.device.type not in ("cpu", "cuda"):
        return False
    return largest_sum(layer.weight[0].numel(), counts.largest, quantizer.bits) < EXACT_SUM


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """A context in which float32 is not shortened, if a tensor is float32.

    Args:
        x: Input of a layer.
    """
    return full_float32() if x.dtype == torch.float32 else nullcontext()


def _apply(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's operator of the layer."""
    return layer._conv_forward(x, weight, bias) if isinstance(layer, nn.Conv2d) else F.linear(x, weight, bias)


def _as_matrices(layer: Any, x: Tensor, codes: Tensor) -> Tensor:
    """Sums as products of matrices; those of a depthwise convolution directly, by PyTorch's own kernel."""
    if not isinstance(layer, nn.Conv2d):
        rows = x.reshape(-1, x.shape[-1])
        return products(rows, codes.t()).view(*x.shape[:-1], len(codes))
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    if layer.groups == x.shape[1]:
        kernel, none = codes.shape[2:], [0, 0]
        return torch.ops.aten._conv_depthwise2d(
            x.float(), codes.float(), kernel, None, layer.stride, none, layer.dilation
        )
    return convolved(x, codes, layer.stride, layer.dilation, layer.groups)
