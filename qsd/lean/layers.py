"""Layers that keep codes of spike counts for the backward pass, and quantize weights again instead of keeping them.

The gradients are those of the plain layers, to the bit: the same operators compute with the same floats. Twice
differentiating is an error.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qsd.kernels import switch
from qsd.lean.operands import cast, save_operand
from qsd.lsq import lsq_backward, lsq_gradients, lsq_grid, lsq_values, on_grid

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Geometry(NamedTuple):
    """How a convolution moves over its input, with zeros around it.

    Attributes:
        stride: Stride by dimension.
        padding: Rows and columns of zeros on each side.
        dilation: Dilation by dimension.
        groups: Groups of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Grid(NamedTuple):
    """The weights of a layer on their grid.

    Attributes:
        values: Weights that the layer multiplies by, in the type of its input.
        scaled: Weights in steps, see `qsd.lsq.lsq_grid`; ``None`` if there are no steps, or a kernel computes them.
        integers: Integers on the grid, or ``None``; overwritten by `Synapse.backward`.
    """

    values: Tensor
    scaled: Tensor | None = None
    integers: Tensor | None = None


class Synapse(NamedTuple):
    """The static configuration of a convolution or linear layer with quantized weights.

    Attributes:
        levels: Smallest and largest integer of the weights' grid, if there are step sizes.
        geometry: Geometry of a convolution; ``None`` for a linear layer.
    """

    levels: tuple[int, int]
    geometry: Geometry | None

    def forward(self, x: Tensor, weight: Tensor, step: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """The layer with its weights put on their grid.

        Args:
            x: ``[B, C_in, H, W]``, or ``[..., C_in]`` for a linear layer.
            weight: Float weights.
            step: Step sizes by output channel; ``None`` to compute with the float weights.
            bias: Bias of the output.
        """
        rounded = weight.to(x.dtype) if step is None else lsq_values(weight, step, *self.levels, x.dtype)
        return F.linear(x, rounded, bias) if self.geometry is None else F.conv2d(x, rounded, bias, *self.geometry)

    def grid(self, weight: Tensor, step: Tensor | None, dtype: torch.dtype) -> Grid:
        """The weights of `forward` again, with the intermediate results that `backward` needs.

        Args:
            weight: Float weights.
            step: Step sizes, or ``None``.
            dtype: Type of the layer's input.
        """
        if step is None:
            return Grid(weight.to(dtype))
        if switch.devices and switch.computes(weight):  # A kernel computes the rest of the grid once more.
            return Grid(lsq_values(weight, step, *self.levels, dtype))
        scaled, integers = lsq_grid(weight, step, *self.levels)
        return Grid(on_grid(integers, step).to(dtype), scaled, integers)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, step: Tensor | None, grid: Grid, mask: list[bool]
    ) -> Gradients:
        """The gradients of `forward`: of input, float weights, bias and step sizes.

        Args:
            grad: Gradient of the output.
            x: Input of `forward`.
            weight: Float weights.
            step: Step sizes, or ``None``.
            grid: Their `grid`.
            mask: Whether the gradients of input, weights and bias are needed.
        """
        x_grad, weight_grad, bias_grad = self._transposed(grad, x, grid.values, mask)
        step_grad = None
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
            if grid.scaled is not None and grid.integers is not None:
                weight_grad, step_grad = lsq_gradients(weight_grad, grid.scaled, grid.integers, *self.levels)
            elif step is not None:
                weight_grad, step_grad = lsq_backward(weight_grad, weight, step, *self.levels)
        return x_grad, weight_grad, bias_grad, step_grad

    def _transposed(
        self, grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.geometry is not None:
            stride, padding, dilation, groups = self.geometry
            return torch.ops.aten.convolution_backward(
                grad, x, weight, [len(weight)], stride, padding, dilation, False, [0, 0], groups, mask
            )
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if mask[0] else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if mask[1] else None,
            rows.sum(0) if mask[2] else None,
        )


class _SynapseFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        step: Tensor | None,
        synapse: Synapse,
        result: Callable[[], Tensor] | None,
    ) -> Tensor:
        ctx.operand, saved = save_operand(x)
        ctx.synapse = synapse
        ctx.save_for_backward(saved, weight, step)
        return synapse.forward(x, weight, step, bias) if result is None else result()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, weight, step = ctx.saved_tensors
        needs = ctx.needs_input_grad
        mask = [needs[0], needs[1] or needs[3], needs[2]]
        x = ctx.operand.restore(saved)
        grid = ctx.synapse.grid(weight, step, x.dtype)
        return *ctx.synapse.backward(grad.to(x.dtype), x, weight, step, grid, mask), None, None


def apply_synapse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step: Tensor | None,
    synapse: Synapse,
    result: Callable[[], Tensor] | None = None,
) -> Tensor:
    """A convolution or linear layer that keeps the codes of its input, if a neuron made it, and no quantized weight.

    Args:
        x: Input ``[B, C_in, H, W]``, or ``[..., C_in]`` for a linear layer.
        weight: Float weights.
        bias: Bias of the output's channels.
        step: Step sizes of the weights' grid ``[C_out]``, or ``None`` to compute with the float weights.
        synapse: Static configuration of the layer.
        result: Computes the result of the layer in another way; the gradients are those of `Synapse.forward`.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = cast(x, working_dtype(x))  # within the function, autocast's casts would not be differentiated
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return _SynapseFunction.apply(x, weight, bias, step, synapse, result)


def working_dtype(x: Tensor) -> torch.dtype:
    """The type that a layer computes in: autocast's choice where it is on.

    Args:
        x: Input of the layer.
    """
    device = x.device.type
    cast_to_half = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast_to_half else x.dtype
