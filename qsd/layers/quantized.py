"""Convolution and linear layers whose weights are quantized to a few bits."""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsd.lean import Geometry, Synapse, apply_synapse, has_hooks
from qsd.quantizers import StepSizeQuantizer


class QuantConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with low-bit weights.

    Args:
        in_channels: channels of the input ``[B, C_in, H, W]``.
        out_channels: channels of the output.
        kernel_size: side of the square kernel.
        stride: stride of the kernel.
        padding: rows and columns of zeros around the input.
        groups: groups of channels; ``in_channels`` makes it depthwise.
        bias: whether a float bias is added.
        weight_bits: 2 to 8, or ``None`` for float weights.
    """

    quantizer: StepSizeQuantizer | None
    lean = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
        weight_bits: int | None = 4,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
        self.quantizer = None if weight_bits is None else StepSizeQuantizer(weight_bits, out_channels)
        initialize_steps(self)

    def train(self, mode: bool = True) -> "QuantConv2d":
        _quantized.pop(self, None)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` to ``[B, C_out, H', W']``."""
        if not is_lean(self):
            return self._conv_forward(x, quantized_weight(self), self.bias)
        return apply_synapse(x, self.weight, self.bias, *lean_form(self))


class QuantLinear(nn.Linear):
    """`torch.nn.Linear` with low-bit weights.

    Args:
        in_features: features of the input ``[..., C_in]``.
        out_features: features of the output.
        bias: whether a float bias is added.
        weight_bits: 2 to 8, or ``None`` for float weights.
    """

    quantizer: StepSizeQuantizer | None
    lean = True

    def __init__(self, in_features: int, out_features: int, bias: bool = True, weight_bits: int | None = 4) -> None:
        super().__init__(in_features, out_features, bias)
        nn.init.trunc_normal_(self.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.bias)
        self.quantizer = None if weight_bits is None else StepSizeQuantizer(weight_bits, out_features)
        initialize_steps(self)

    def train(self, mode: bool = True) -> "QuantLinear":
        _quantized.pop(self, None)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C_in]`` to ``[..., C_out]``."""
        if not is_lean(self):
            return F.linear(x, quantized_weight(self), self.bias)
        return apply_synapse(x, self.weight, self.bias, *lean_form(self))


def is_lean(layer: QuantConv2d | QuantLinear) -> bool:
    """Whether a layer runs by `qsd.lean.apply_synapse`.

    It does only when gradients are recorded and the code is not being compiled, for quantizers of ours without hooks
    and for zeros as padding.

    Args:
        layer: Quantized or float layer.
    """
    if not (layer.lean and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return False
    if isinstance(layer, QuantConv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return False
    quantizer = layer.quantizer
    return quantizer is None or (type(quantizer) is StepSizeQuantizer and not has_hooks(quantizer))


def lean_form(layer: QuantConv2d | QuantLinear) -> tuple[Tensor | None, Synapse]:
    """Step sizes and static configuration of a layer, for `qsd.lean.apply_synapse`.

    Args:
        layer: Quantized or float layer.
    """
    quantizer, geometry = layer.quantizer, None
    if isinstance(layer, QuantConv2d):
        assert not isinstance(layer.padding, str)
        geometry = Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
    if quantizer is None:
        return None, Synapse((0, 0), geometry)
    return quantizer.step, Synapse((quantizer.q_min, quantizer.q_max), geometry)


class _Quantized(NamedTuple):
    state: tuple[tuple[object, ...], ...]
    parameters: tuple[Tensor, ...]
    weight: Tensor


# Quantized weights of layers in evaluation: outside of the modules, so that no copy, checkpoint or average sees them.
_quantized: WeakKeyDictionary[nn.Module, _Quantized] = WeakKeyDictionary()


def quantized_weight(layer: QuantConv2d | QuantLinear) -> Tensor:
    """The weight that the layer computes with: quantized, or the float one if it has no quantizer.

    In evaluation without gradients it is computed once, and again when weights or steps change or the layer is put into
    training or evaluation mode. Do not write into it. (Writing through ``.data`` is what PyTorch does not count as
    a change.)

    Args:
        layer: quantized or not.
    """
    quantizer, weight = layer.quantizer, layer.weight
    if quantizer is None:
        return weight
    if layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_special(weight):
        return quantizer(weight)
    parameters = (weight, quantizer.step)
    state = tuple((t.data_ptr(), t._version, t.dtype) for t in parameters)
    known = _quantized.get(layer)
    if known is None or known.state != state:
        # Aliases of the parameters, so that their memory is not given to others.
        known = _Quantized(state, tuple(t.detach() for t in parameters), quantizer(weight))
        _quantized[layer] = known
    return known.weight


def _is_special(weight: Tensor) -> bool:
    """Whether changes cannot be noticed: tensors without versions or of other kinds."""
    return weight.is_inference() or type(weight) is not nn.Parameter


def initialize_steps(model: nn.Module) -> None:
    """Set the step sizes of all quantized layers from their present float weights.

    Call it after float weights were loaded into a quantized model, or weights were initialised anew.

    Args:
        model: any module; quantized layers are found at any depth.
    """
    for module in model.modules():
        if isinstance(module, QuantConv2d | QuantLinear) and module.quantizer is not None:
            module.quantizer.initialize(module.weight)
