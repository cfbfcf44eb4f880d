"""The switch of integer operands, and the bound that makes their sums exact, by layer."""

from typing import Literal, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from qsd.errors import QsdError
from qsd.layers.chains import LinearChain
from qsd.layers.quantized import QuantConv2d, QuantLinear
from qsd.operands import EXACT_SUM, largest_sum

# Off; on; on, with inner layers of chains in full float32.
IntegerOperands = bool | Literal["all"]


def set_integer_operands(model: nn.Module, enable: IntegerOperands = True) -> None:
    """Let layers that see spike counts add up integers, with the same result in every number format.

    A layer whose input is a neuron's output, and whose weights are quantized, computes with the integers of both: it
    sums in float32, where the sum is exact, multiplies by amplitude times step size once, and passes on float32. So its
    result is the same, bit by bit, in float32, in TF32 and under autocast to half precision, given the same counts. It
    differs from that of the decoded operands by rounding in the last digits.

    Layers of images, and layers whose sums could be too large (see `largest_sums`), compute in full float32. Inner
    layers of a chain, which see neither counts nor an image, follow autocast and PyTorch's setting of TF32, and
    may change counts, unless they compute in full float32, too. The backward pass of a training multiplies gradients by
    decoded operands, as ever. Compiled networks, converted networks and float64 do not change.

    Args:
        model: Any module; neurons, layers and pools are found at any depth.
        enable: Whether integer operands are used; they are not in a new network. ``"all"`` uses them and computes inner
            layers in full float32, so that all spike counts are those of float32.

    Raises:
        QsdError: For any other setting.
    """
    if enable not in (True, False, "all"):
        raise QsdError(f"integer_operands={enable!r} is unknown; use true, false or 'all'.")
    for module in model.modules():
        if hasattr(module, "integer_operands"):
            module.integer_operands = bool(enable)  # type: ignore[assignment]
    for layer in inner_layers(model):
        layer.integer_operands = enable == "all"


def inner_layers(model: nn.Module) -> list[QuantConv2d]:
    """The convolutions that see the output of another convolution, without a neuron between.

    Args:
        model: Any module.
    """
    chains = [module for module in model.modules() if isinstance(module, LinearChain)]
    return [layer for chain in chains for layer in [m for m in chain if isinstance(m, QuantConv2d)][1:]]


def has_counts_of_float32(model: nn.Module) -> bool:
    """Whether evaluation under autocast and in TF32 has the spike counts of float32: every layer is switched on.

    Args:
        model: Any module. A compiled one has other counts.
    """
    layers = [m for m in model.modules() if isinstance(m, _ConvNd | nn.Linear)]
    compiled = any(m._compiled_call_impl is not None for m in model.modules())
    return bool(layers) and not compiled and all(getattr(layer, "integer_operands", False) for layer in layers)


class LargestSum(NamedTuple):
    """The bound of a layer.

    Attributes:
        bound: No partial sum of counts times codes has a larger absolute value.
        exact: Whether that is below 2**24, so that float32 holds all of them.
    """

    bound: int
    exact: bool


def largest_sums(model: nn.Module, time_steps: int) -> dict[str, LargestSum]:
    """The largest sum that each quantized layer can meet, ``K * T * 2**(bits - 1)`` for K inputs of an output.

    Args:
        model: Any module. Inner layers of chains, which see no counts, are left out.
        time_steps: T of the neurons.

    Returns:
        Bounds by the layer's dotted name. That of a classifier of a mean over N tokens holds for one token: the sum
        over the tokens has N times the bound.
    """
    inner = {id(layer) for layer in inner_layers(model)}
    bounds = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantConv2d | QuantLinear) and layer.quantizer is not None and id(layer) not in inner:
            bound = largest_sum(layer.weight[0].numel(), time_steps, layer.quantizer.bits)
            bounds[name] = LargestSum(bound, bound < EXACT_SUM)
    return bounds
