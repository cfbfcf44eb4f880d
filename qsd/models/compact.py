"""A trained network at the precision that it really has: integers of a few bits, their steps, and the rest."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import is_model, model_entrypoint
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from qsd.errors import QsdError
from qsd.layers import QuantConv2d, QuantLinear
from qsd.layers.renamed import rename_parameters
from qsd.layers.steps import step_names
from qsd.layers.wrappers import inner_model, unwrapped
from qsd.lsq import on_grid
from qsd.models.checkpoints import check_weights

# A constructor may register a parameter more than once, and a file holds at least one tensor per layer.
_PARAMETERS_PER_TENSOR = 4


@dataclass
class CompactModel:
    """The state of a trained network, from which it can be rebuilt bit for bit.

    Attributes:
        tensors: State dict on the CPU, with int8 integers in place of the weights that are quantized.
        bits: Width of those weights, by name.
        time_steps: T of the neurons, by name.
        registered: Name and arguments by which timm builds the network (``name``, ``arguments``), or ``None`` for a
            model of the user's own.
        parameters: Number of parameters, step sizes not counted.
        steps: Names of the step sizes.
    """

    tensors: dict[str, Tensor]
    bits: dict[str, int]
    time_steps: dict[str, int]
    registered: dict[str, Any] | None
    parameters: int
    steps: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        rename_parameters(self.tensors)  # of files that version 0.1.0 wrote

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> "CompactModel":
        """Take a model's state.

        Args:
            model: Trained model; it is not changed.

        Raises:
            QsdError: For values that are not finite, and steps that are not positive.
        """
        model = unwrapped(model)
        state = model.state_dict()
        other = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if other:
            raise QsdError(f"the model's state {other[0]} is no tensor; only tensors can be stored.")
        steps = step_names(model)
        check_weights(state, state, "the model", steps)
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
        bits = {}
        for name, layer in _quantized_layers(model):
            assert layer.quantizer is not None
            # Multiplied by the step and divided by it again they are the same integers, in bfloat16 too: its 8 binary
            # digits suffice for 8 bits.
            tensors[f"{name}.weight"] = layer.quantizer.integers(layer.weight).cpu()
            bits[f"{name}.weight"] = layer.quantizer.bits
        parameters = sum(p.numel() for name, p in model.named_parameters() if name not in steps)
        compact = cls(tensors, bits, _time_steps(model), None, parameters, frozenset(steps))
        compact.registered = _registration(model, compact)
        return compact

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The state dict of the quantized model: weights are integers times steps.

        Args:
            dtype: Float type to compute in and to return, instead of the stored one.
        """
        state = {
            name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            for name, tensor in self.tensors.items()
        }
        for name in self.bits:
            state[name] = on_grid(state[name], state[_step_of(name)])
        return state

    def build(self, skeleton: nn.Module | None = None) -> nn.Module:
        """The model, ready to be evaluated or trained on.

        Args:
            skeleton: A model of the same structure to load into; ``None`` to build a registered one.

        Raises:
            QsdError: If there is no skeleton for a model of the user's own, or it does not fit; it is then unchanged.
        """
        if skeleton is None:
            if self.registered is None:
                raise QsdError(
                    "this is a model of your own, which timm cannot build: pass one of the same structure, model=..."
                )
            with torch.device("meta"), _at_most(_PARAMETERS_PER_TENSOR * len(self.tensors)):
                self._check_fit(build_registered(self.registered))  # before memory is allocated
            skeleton = build_registered(self.registered)
        self.load_into(skeleton)
        return skeleton

    def load_into(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Give a model of the same structure these weights.

        Args:
            model: Model to load into; it takes over the stored data types, and stays on its device.
            dtype: Float type to compute in, instead of the stored one.

        Raises:
            QsdError: If the model does not fit; it is then unchanged.
        """
        model = inner_model(model)
        self._check_fit(model)
        state = self.state_dict(dtype)
        with torch.no_grad():
            for name, target in model.state_dict(keep_vars=True).items():
                target.data = state[name].to(target.device, copy=True)

    def _check_fit(self, model: nn.Module) -> None:
        expected = model.state_dict()
        check_weights(self.tensors, expected, "the packed model", step_names(model))
        for what, here, there in (
            ("weight bits", self.bits, {f"{n}.weight": q.quantizer.bits for n, q in _quantized_layers(model)}),
            ("time steps", self.time_steps, _time_steps(model)),
        ):
            name = next((n for n in sorted(here.keys() | there.keys()) if here.get(n) != there.get(n)), None)
            if name is not None:
                raise QsdError(
                    f"the packed model does not fit: {what} of {name} are {here.get(name)} in the file, "
                    f"{there.get(name)} in the model."
                )
        for name, tensor in self.tensors.items():
            if name not in self.bits and tensor.is_floating_point() != expected[name].is_floating_point():
                kind = str(expected[name].dtype).removeprefix("torch.")
                raise QsdError(
                    f"the packed model does not fit: {name} is {str(tensor.dtype).removeprefix('torch.')} in the "
                    f"file, {kind} in the model."
                )


def build_registered(registered: Mapping[str, Any]) -> nn.Module:
    """Build a registered model.

    Args:
        registered: Its ``name`` and ``arguments``.

    Raises:
        QsdError: If timm does not know the name, or the model its arguments.
    """
    name, arguments = registered["name"], registered["arguments"]
    if not is_model(name):
        raise QsdError(f"model {name!r} is not registered; import the package that registers it, or pass model=...")
    try:
        return model_entrypoint(name)(**arguments)
    except QsdError:
        raise
    except Exception as error:  # Arguments may come from a file, and constructors do not check them.
        reason = " ".join(str(error).split())
        raise QsdError(f"model {name!r} does not take its stored arguments {arguments}: {reason}.") from error


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Stop the construction of a model that registers more parameters, as one of a million blocks would.

    Raises:
        QsdError: Within the block, at the first parameter too many.
    """
    registered = 0

    def count(*_: Any) -> None:
        nonlocal registered
        registered += 1
        if registered > parameters:
            raise QsdError("the packed model does not fit the model: its stored arguments build a larger one.")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantConv2d | QuantLinear) and module.quantizer is not None:
            yield name, module


def _step_of(weight: str) -> str:
    return f"{weight.removesuffix('weight')}quantizer.step"


def _time_steps(model: nn.Module) -> dict[str, int]:
    return {n: m.time_steps for n, m in model.named_modules() if n and isinstance(getattr(m, "time_steps", None), int)}


def _registration(model: nn.Module, compact: CompactModel) -> dict[str, Any] | None:
    """Name and arguments of a registered model, unless its structure was changed after it was built."""
    registered = getattr(model, "registered", None)
    if registered is None:
        return None
    arguments = dict(registered["arguments"])
    if "num_classes" in arguments or hasattr(model, "num_classes"):
        arguments["num_classes"] = getattr(model, "num_classes", arguments.get("num_classes"))
    try:
        registered = json.loads(json.dumps({"name": registered["name"], "arguments": arguments}))
    except TypeError:
        return None  # an argument that is an object, not a value
    with torch.device("meta"):
        skeleton = build_registered(registered)
    same = (
        _time_steps(skeleton) == compact.time_steps
        and _types(skeleton) == _types(model)
        and {n: t.shape for n, t in skeleton.state_dict().items()} == {n: t.shape for n, t in compact.tensors.items()}
        and {f"{n}.weight": layer.quantizer.bits for n, layer in _quantized_layers(skeleton)} == compact.bits
    )
    return registered if same else None


def _types(model: nn.Module) -> list[tuple[str, type, Any]]:
    # SyncBatchNorm is batch norm, on several GPUs
    norms = {nn.SyncBatchNorm: nn.BatchNorm2d}
    return [
        (name, norms.get(type(module), type(module)), getattr(module, "memory", None))
        for name, module in model.named_modules()
    ]
