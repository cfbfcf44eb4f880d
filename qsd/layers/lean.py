"""Layers that keep spike counts for the backward pass, not floats, and quantize weights again instead of keeping them.

The gradients are those of the plain layers, to the bit: what is kept is turned back into the same floats, and the same
operators compute with them. Twice differentiating is an error.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qsd.functional import lsq_gradients, lsq_grid
from qsd.spike_codes import Kept, Spikes, spikes_of

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class LeanLinear:
    """A linear layer without its tensors.

    Attributes:
        levels: smallest and largest integer of the weights' grid, if there are steps.
    """

    levels: tuple[int, int]

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer.

        Args:
            x: ``[..., C_in]``.
            weight: as it is computed with.
            bias: of the output.
        """
        return F.linear(x, weight, bias)

    def transpose(
        self, grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of `apply`.

        Args:
            grad: of the output.
            x: see there.
            weight: see there.
            mask: which of the three are wanted.
        """
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if mask[0] else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if mask[1] else None,
            rows.sum(0) if mask[2] else None,
        )

    def forward(self, x: Tensor, weight: Tensor, step: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """`apply` with the weights put on their grid.

        Args:
            x: see there.
            weight: float weights.
            step: step sizes by output channel; ``None`` to compute with the float weights.
            bias: see there.
        """
        rounded = weight if step is None else lsq_grid(weight, step, *self.levels)[2]
        return self.apply(x, rounded.to(x.dtype), bias)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, step: Tensor | None, mask: list[bool]) -> Gradients:
        """The gradients of `forward`: of input, float weights, bias and steps.

        Args:
            grad: of the output.
            x: see there.
            weight: see there.
            step: see there.
            mask: whether those of input, weights and bias are wanted.
        """
        scaled, integers, rounded = (None, None, weight) if step is None else lsq_grid(weight, step, *self.levels)
        x_grad, weight_grad, bias_grad = self.transpose(grad, x, rounded.to(x.dtype), mask)
        step_grad = None
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
            if scaled is not None and integers is not None:
                weight_grad, step_grad = lsq_gradients(weight_grad, scaled, integers, *self.levels)
        return x_grad, weight_grad, bias_grad, step_grad


@dataclass(frozen=True)
class LeanConv(LeanLinear):
    """A convolution without its tensors.

    Attributes:
        stride: by dimension.
        padding: by dimension.
        dilation: by dimension.
        groups: of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def transpose(
        self, grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, [len(weight)], self.stride, self.padding, self.dilation, False, [0, 0], self.groups, mask
        )


class _LeanLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        step: Tensor | None,
        layer: LeanLinear,
        spikes: Spikes | None,
    ) -> Tensor:
        ctx.kept, saved, amplitude = Kept.of(x, spikes)
        ctx.layer = layer
        ctx.save_for_backward(saved, amplitude, weight, step)
        return layer.forward(x, weight, step, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, amplitude, weight, step = ctx.saved_tensors
        needs = ctx.needs_input_grad
        x = ctx.kept.operand(saved, amplitude)
        mask = [needs[0], needs[1] or needs[3], needs[2]]
        return *ctx.layer.backward(grad, x, weight, step, mask), None, None


def lean_layer(x: Tensor, weight: Tensor, bias: Tensor | None, step: Tensor | None, layer: LeanLinear) -> Tensor:
    """A convolution or linear layer that keeps the codes of its input, if a neuron left some, and no quantized weight.

    Args:
        x: input ``[B, C_in, H, W]``, or ``[..., C_in]`` for a linear layer.
        weight: float weights.
        bias: of the output's channels.
        step: step sizes of the weights' grid ``[C_out]``, or ``None`` to compute with the float weights.
        layer: the rest of it.
    """
    spikes, dtype = spikes_of(x), working_dtype(x)
    # Within the function, autocast's casts would not be differentiated.
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    return _LeanLayer.apply(x, weight, bias, step, layer, spikes)


def working_dtype(x: Tensor) -> torch.dtype:
    """What a layer computes in: autocast's choice where it is on.

    Args:
        x: input of the layer.
    """
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else x.dtype


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see what the module itself is given or returns.

    Args:
        module: any module.
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def set_lean(model: nn.Module, enable: bool = True) -> None:
    """Switch between memory-lean training, which is the default, and ordinary layers that keep floats.

    Lean layers keep spike counts in half a byte, quantize weights again instead of keeping them, and run the norms of a
    chain together. Outputs and gradients are the same, bit by bit for neurons, convolutions and products, up to
    rounding for two norms in a row and learned steps. Evaluation and compiled training do not change.

    Args:
        model: any module; neurons, layers and chains are found at any depth.
        enable: switch it on or off.
    """
    for module in model.modules():
        if hasattr(module, "lean"):
            module.lean = enable  # type: ignore[assignment]
