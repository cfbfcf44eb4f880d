"""Convolution and linear layers whose weights are quantized to a few bits."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsd.collapse import watch_step
from qsd.layers.integer_sums import full_precision, integer_sums, is_exact
from qsd.layers.weights import forget_weights
from qsd.layers.weights import quantized_weight as quantized_weight
from qsd.lean import Choice, Geometry, Synapse, apply_synapse, cast, has_hooks, trains_lean
from qsd.operands import counts_of
from qsd.quantizers import StepSizeQuantizer


class QuantConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with low-bit weights.

    Args:
        in_channels: Channels of the input ``[B, C_in, H, W]``.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel, or its height and width.
        stride: Stride of the kernel.
        padding: Rows and columns of zeros around the input, or ``"same"`` or ``"valid"``.
        groups: Groups of channels; ``in_channels`` makes it depthwise.
        bias: Whether a float bias is added.
        weight_bits: 2 to 8, or ``None`` for float weights.
        dilation: Distance of the kernel's taps.
    """

    quantizer: StepSizeQuantizer | None
    lean: Choice = "auto"
    integer_operands: bool = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = False,
        weight_bits: int | None = 4,
        dilation: int | tuple[int, int] = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.quantizer = None if weight_bits is None else StepSizeQuantizer(weight_bits, out_channels)
        initialize_steps(self)

    def train(self, mode: bool = True) -> "QuantConv2d":
        forget_weights(self)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` to ``[B, C_out, H', W']``."""
        if self.integer_operands and not torch.compiler.is_compiling():
            return with_integers(self, x)
        form = lean_form(self, x)
        if form is None:
            return self._conv_forward(x, quantized_weight(self), self.bias)
        return apply_synapse(x, self.weight, self.bias, *form)


class QuantLinear(nn.Linear):
    """`torch.nn.Linear` with low-bit weights.

    Args:
        in_features: Features of the input ``[..., C_in]``.
        out_features: Features of the output.
        bias: Whether a float bias is added.
        weight_bits: 2 to 8, or ``None`` for float weights.
    """

    quantizer: StepSizeQuantizer | None
    lean: Choice = "auto"
    integer_operands: bool = False

    def __init__(self, in_features: int, out_features: int, bias: bool = True, weight_bits: int | None = 4) -> None:
        super().__init__(in_features, out_features, bias)
        nn.init.trunc_normal_(self.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.bias)
        self.quantizer = None if weight_bits is None else StepSizeQuantizer(weight_bits, out_features)
        initialize_steps(self)

    def train(self, mode: bool = True) -> "QuantLinear":
        forget_weights(self)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C_in]`` to ``[..., C_out]``."""
        if self.integer_operands and not torch.compiler.is_compiling():
            return with_integers(self, x)
        form = lean_form(self, x)
        if form is None:
            return F.linear(x, quantized_weight(self), self.bias)
        return apply_synapse(x, self.weight, self.bias, *form)


def lean_form(
    layer: QuantConv2d | QuantLinear, x: Tensor, always: bool = False
) -> tuple[Tensor | None, Synapse] | None:
    """Step sizes and static configuration of a layer for `qsd.lean.apply_synapse`, or ``None`` to run it plainly.

    It runs plainly where `qsd.set_lean` says so, in evaluation, under a compiler, which decides itself what to keep,
    and where `apply_synapse` would not see everything: quantizers of others or with hooks, and padding other than with
    zeros.

    Args:
        layer: Quantized or float layer.
        x: Its input.
        always: Whether the setting of `qsd.set_lean` does not matter.
    """
    if not trains_lean(True if always else layer.lean, x):
        return None
    geometry = None
    if isinstance(layer, QuantConv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return None
        geometry = Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
    quantizer = layer.quantizer
    if quantizer is None:
        return None, Synapse((0, 0), geometry)
    if type(quantizer) is not StepSizeQuantizer or has_hooks(quantizer):
        return None
    if quantizer.step._version != quantizer.seen:  # Here, because each call takes time.
        quantizer.seen = quantizer.step._version
        watch_step(quantizer, quantizer.step)
    return quantizer.step, Synapse((quantizer.q_min, quantizer.q_max), geometry)


def with_integers(layer: QuantConv2d | QuantLinear, x: Tensor) -> Tensor:
    """The layer by exact sums of counts times codes where that can be, else in full float32.

    The result has the type of the weights, also under autocast. The backward pass is that of the decoded operands, in
    autocast's type.

    Args:
        layer: Quantized or float layer.
        x: Its input.
    """
    counts = counts_of(x)
    if counts is not None and is_exact(layer, counts):
        if not torch.is_grad_enabled():
            return integer_sums(layer, counts)
        form = lean_form(layer, x, always=True)
        if form is not None:
            return apply_synapse(x, layer.weight, layer.bias, *form, lambda: integer_sums(layer, counts))
    x = cast(x, layer.weight.dtype)
    with full_precision(x), torch.autocast(x.device.type, enabled=False):
        return _decoded(layer, x)


def _decoded(layer: QuantConv2d | QuantLinear, x: Tensor) -> Tensor:
    """The layer without integer operands. Layers do the same themselves, because each call takes time."""
    form = lean_form(layer, x)
    if form is not None:
        return apply_synapse(x, layer.weight, layer.bias, *form)
    weight = quantized_weight(layer)
    if isinstance(layer, QuantConv2d):
        return layer._conv_forward(x, weight, layer.bias)
    return F.linear(x, weight, layer.bias)


def initialize_steps(model: nn.Module) -> None:
    """Set the step sizes of all quantized layers from their present float weights.

    Call it after float weights were loaded into a quantized model, or weights were initialised anew.

    Args:
        model: Any module; quantized layers are found at any depth.
    """
    for module in model.modules():
        if isinstance(module, QuantConv2d | QuantLinear) and module.quantizer is not None:
            module.quantizer.initialize(module.weight)
