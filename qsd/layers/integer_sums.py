"""Quantized layers in evaluation with integer operands, see `qsd.operands`."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsd.layers.weights import quantized_weight, weight_codes
from qsd.lean import has_hooks
from qsd.operands import EXACT_OPERAND, EXACT_SUM, Counts, convolved, counts_of, largest_sum, operand_dtype, products
from qsd.precision import full_float32
from qsd.quantizers import StepSizeQuantizer


def evaluate(layer: Any, x: Tensor) -> Tensor:
    """A convolution or linear layer by exact sums of counts times codes where that can be, else in full float32.

    The result has the type of the weights, also under autocast.

    Args:
        layer: `qsd.layers.QuantConv2d` or `qsd.layers.QuantLinear`.
        x: Its input.
    """
    counts = counts_of(x)
    exact = None if counts is None else evaluate_counts(layer, counts)
    return evaluate_floats(layer, x) if exact is None else exact


def evaluate_floats(layer: Any, x: Tensor) -> Tensor:
    """The layer with decoded operands in the type of its weights, where autocast and TF32 would shorten them.

    Args:
        layer: `qsd.layers.QuantConv2d` or `qsd.layers.QuantLinear`.
        x: Its input.
    """
    x = x.to(layer.weight.dtype)
    with _full_precision(x), torch.autocast(x.device.type, enabled=False):
        return _apply(layer, x, quantized_weight(layer), layer.bias)


def evaluate_counts(layer: Any, counts: Counts) -> Tensor | None:
    """The layer as sums of integers in float32, times the product of amplitude and step sizes, plus the bias.

    Args:
        layer: `qsd.layers.QuantConv2d` or `qsd.layers.QuantLinear`.
        counts: Its input.

    Returns:
        The result in float32, or ``None`` if sums need not be exact or cannot be computed so.
    """
    if not is_exact(layer, counts.largest) or counts.values.device.type not in ("cpu", "cuda"):
        return None
    x, quantizer = counts.values, layer.quantizer
    x = x.to(operand_dtype(x.device, counts.largest))
    codes = weight_codes(layer, x.dtype)
    # Larger operands are not exact in every format that PyTorch may shorten float32 to.
    wide = counts.largest > EXACT_OPERAND[torch.bfloat16]
    with _full_precision(x) if wide else nullcontext(), torch.autocast(x.device.type, enabled=False):
        sums = _apply(layer, x, codes, None) if x.is_cpu else _as_matrices(layer, x, codes)
        scale, bias = quantizer.step * counts.amplitude, layer.bias
        if isinstance(layer, nn.Conv2d):
            scale = scale.view(-1, 1, 1)
            bias = None if bias is None else bias.view(-1, 1, 1)
        sums = sums.mul_(scale)
        return sums if bias is None else sums.add_(bias)


def is_exact(layer: Any, largest: int) -> bool:
    """Whether the sums of a layer are exact integers for all inputs, and all its parameters are float32.

    Args:
        layer: `qsd.layers.QuantConv2d` or `qsd.layers.QuantLinear`.
        largest: The largest count of its input.
    """
    quantizer = layer.quantizer
    if type(quantizer) is not StepSizeQuantizer or has_hooks(quantizer):
        return False
    if any(p.dtype != torch.float32 for p in (layer.weight, quantizer.step)):
        return False
    return largest_sum(layer.weight[0].numel(), largest, quantizer.bits) < EXACT_SUM


def _full_precision(x: Tensor) -> Any:
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
