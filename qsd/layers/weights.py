"""The weights that quantized layers compute with, and the memory of them in evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class _EvaluationWeights(NamedTuple):
    """Weights of a layer in evaluation and the state of the parameters that they were computed from.

    Attributes:
        state: Addresses, versions and types of weight and steps.
        parameters: Their memory, held so that it is not given to other tensors of the same address and version.
        values: The quantized weight by ``None``, the codes by their type.
    """

    state: tuple[tuple[object, ...], ...]
    parameters: tuple[Tensor, ...]
    values: dict[torch.dtype | None, Tensor]

    @staticmethod
    def state_of(parameters: tuple[Tensor, ...]) -> tuple[tuple[object, ...], ...]:
        return tuple((t.data_ptr(), t._version, t.dtype) for t in parameters)


# They are kept outside of the modules, so that copies, checkpoints and averages of a model do not hold them, and
# disappear with their layer.
_EVALUATION_WEIGHTS: WeakKeyDictionary[nn.Module, _EvaluationWeights] = WeakKeyDictionary()


def forget_weights(layer: nn.Module) -> None:
    """Let the weights of a layer be computed anew.

    Args:
        layer: A layer that is put into training or evaluation mode.
    """
    _EVALUATION_WEIGHTS.pop(layer, None)


def quantized_weight(layer: Any) -> Tensor:
    """The weight that the layer computes with: quantized, or the float one if it has no quantizer.

    In evaluation without gradients it is computed once, and again when weights or steps change or the layer is put into
    training or evaluation mode. Do not write into it. (PyTorch does not count writing through ``.data`` as a change.)

    Args:
        layer: Quantized or float layer.
    """
    quantizer, weight = layer.quantizer, layer.weight
    return weight if quantizer is None else _once(layer, None, lambda: quantizer(weight))


def weight_codes(layer: Any, dtype: torch.dtype) -> Tensor:
    """The integers of a layer's quantized weight, computed once in evaluation, as `quantized_weight` is.

    Args:
        layer: Quantized layer.
        dtype: Floating-point type of the result.
    """
    return _once(layer, dtype, lambda: layer.quantizer.integers(layer.weight).to(dtype))


def _once(layer: Any, key: torch.dtype | None, compute: Callable[[], Tensor]) -> Tensor:
    weight = layer.weight
    if layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_special(weight):
        return compute()
    parameters = weight, layer.quantizer.step
    state = _EvaluationWeights.state_of(parameters)
    known = _EVALUATION_WEIGHTS.get(layer)
    if known is None or known.state != state:
        known = _EvaluationWeights(state, tuple(t.detach() for t in parameters), {})
        _EVALUATION_WEIGHTS[layer] = known
    if key not in known.values:
        known.values[key] = compute()
    return known.values[key]


def _is_special(weight: Tensor) -> bool:
    """Whether changes cannot be noticed: tensors without versions or of other kinds."""
    return weight.is_inference() or type(weight) is not nn.Parameter
