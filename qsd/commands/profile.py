"""Count the parameters, operations, neurons and bytes of registered models, and the operations of their training.

Examples:
  qsd profile csdformer_8_512 csdformer_8_768
  qsd profile qsd_15m --img-size 384 --model-args '{"time_steps": 8}' --json
"""

import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qsd import measure_energy, model_size, program, to_spike_driven
from qsd.errors import QsdError
from qsd.layers import QuantConv2d, QuantLinear, quantized_weight
from qsd.layers.steps import step_names
from qsd.neurons import SpikeNeuron

_IMAGENET, _CIFAR = 1_281_167, 50_000  # training images
_PRODUCTS = ("bmm", "baddbmm")
_IMAGES = 2  # of the measured pass: batch norm does not train on one image where one token is left


def main(args: Sequence[str] | None = None) -> int:
    """Run ``qsd profile``.

    Args:
        args: The arguments; ``None`` for those of the process.

    Returns:
        The exit code, as of `qsd.program.run`.
    """
    return program.run("qsd", _command, args)


def _command(args: list[str]) -> None:
    parser = program.Parser(prog="qsd profile", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="registered models")
    parser.add_argument("--img-size", type=int, help="height and width in pixels; the default is the model's own")
    parser.add_argument("--model-args", type=json.loads, default={}, help="further arguments of the models, as JSON")
    parser.add_argument("--epoch-images", type=int, help="training images; the default is ImageNet's, or CIFAR's")
    parser.add_argument("--spikes", action="store_true", help="also convert the models and step through a random image "
                        "for those of NeuroBench's metrics that depend on spikes")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(args)
    arguments = options.img_size, options.model_args, options.epoch_images, options.spikes
    profiles = [profile(name, *arguments) for name in options.names]
    if options.json:
        print(json.dumps([asdict(p) for p in profiles], indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else 190)
        console.print(_table(profiles))
        console.print(_neurobench_table(profiles))


@dataclass
class Profile:
    """Sizes and costs of a model. Operations are multiply-accumulates (MACs) of the forward pass of one image.

    Attributes:
        name: The registered name.
        image_size: Height and width in pixels.
        time_steps: T, or ``None`` for a float network.
        parameters: The number of parameters, without step sizes.
        macs: Operations of layers with weights.
        product_macs: Operations of products of two activations (attention).
        neurons: Neurons, or ReLUs of a float network, per image.
        kept_bytes: Bytes that are kept for the backward pass per image, in float32.
        packed_bytes: Bytes of the model at its real precision.
        epoch_images: Training images of an epoch.
        epoch_macs: Operations of a training epoch: the forward pass once, and twice as many backward.
        direct_epoch_macs: Operations of an epoch of direct training of the same skeleton as a spiking network, which
            runs T times per image, as the CSDformer paper counts; ``None`` for a float network.
        neurobench: NeuroBench's metrics by their names: of the trained network those that depend on no image, the
            others ``None``; or all of them of the converted network, for one random image.
    """

    name: str
    image_size: int
    time_steps: int | None
    parameters: int
    macs: int
    product_macs: int
    neurons: int
    kept_bytes: int
    packed_bytes: int
    epoch_images: int
    epoch_macs: int
    direct_epoch_macs: int | None
    neurobench: dict[str, Any]


def profile(
    name: str,
    image_size: int | None = None,
    model_args: dict[str, Any] | None = None,
    epoch_images: int | None = None,
    spikes: bool = False,
) -> Profile:
    """Profile one model.

    Args:
        name: A name that is registered with timm.
        image_size: Height and width in pixels; ``None`` for the model's own.
        model_args: Further arguments of the model.
        epoch_images: Images of an epoch; ``None`` for ImageNet's, or CIFAR's where the model's own size is CIFAR's.
        spikes: Whether the model is converted and measured on a random image, for NeuroBench's metrics.

    Raises:
        QsdError: If the name is unknown, or the sizes do not fit.
    """
    model = _create(name, model_args)
    native = model.pretrained_cfg["input_size"][-1]
    size = native if image_size is None else image_size
    packed_bytes = model_size(model).packed_bytes
    measured = _measure(model.train(), size)
    epoch_images = epoch_images or (_CIFAR if native == 32 else _IMAGENET)
    epoch_macs = 3 * (measured["macs"] + measured["product_macs"]) * epoch_images
    time_steps = next((m.time_steps for m in model.modules() if isinstance(m, SpikeNeuron)), None)
    if spikes and time_steps is not None:
        neurobench = _measured_metrics(model.eval(), size)
    else:
        dense = (time_steps or 1) * (measured["macs"] + measured["product_macs"])
        neurobench = _static_metrics(model, packed_bytes, dense)
    return Profile(
        name=name,
        image_size=size,
        time_steps=time_steps,
        parameters=sum(p.numel() for key, p in model.named_parameters() if key not in step_names(model)),
        packed_bytes=packed_bytes,
        epoch_images=epoch_images,
        epoch_macs=epoch_macs,
        direct_epoch_macs=None if time_steps is None else time_steps * epoch_macs,
        neurobench=neurobench,
        **measured,
    )


def _create(name: str, model_args: dict[str, Any] | None) -> Any:
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)) or "none"
        raise QsdError(f"model {name!r} is unknown to timm; nearest names: {near}.")
    try:
        return timm.create_model(name, **(model_args or {}))
    except TypeError as error:
        raise QsdError(f"model {name} does not take model_args={model_args}: {error}.") from error


def _static_metrics(model: nn.Module, packed_bytes: int, dense: int) -> dict[str, Any]:
    """NeuroBench's metrics of a trained network, as far as they depend on no image."""
    weights = [quantized_weight(m) for m in model.modules() if isinstance(m, QuantConv2d | QuantLinear)]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    return {
        "footprint": packed_bytes,
        "connection_sparsity": zeros / total if total else 0.0,
        "activation_sparsity": None,
        "synaptic_operations": {"Effective_MACs": None, "Effective_ACs": None, "Dense": dense},
        "membrane_updates": None,
    }


def _measured_metrics(model: nn.Module, size: int) -> dict[str, Any]:
    """NeuroBench's metrics of the converted network, for one random image."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, getattr(model, "in_chans", 3), size, size, generator=generator)
    return measure_energy(to_spike_driven(model, example=image), image, progress=False).neurobench


def _neurobench_table(profiles: list[Profile]) -> Table:
    """NeuroBench's metrics by name, one model a row; a dash for what depends on images that were not run."""
    operations = ("Effective_MACs", "Effective_ACs", "Dense")
    plain = ("footprint", "connection_sparsity", "activation_sparsity", "membrane_updates")
    table = Table("model", *plain, *operations, title="NeuroBench's metrics, per image")
    for p in profiles:
        values = [p.neurobench[name] for name in plain] + [p.neurobench["synaptic_operations"][n] for n in operations]
        table.add_row(p.name, *("-" if value is None else f"{value:.4g}" for value in values))
    return table


def _measure(model: nn.Module, size: int) -> dict[str, int]:
    """Operations, neurons and kept bytes of one image, from a training pass without numbers."""
    neurons = _count_neurons(model)
    with FakeTensorMode() as fake:  # shapes alone: the pass takes no time and no memory
        state: dict[str, Tensor] = {
            key: fake.from_tensor(tensor) for key, tensor in model.state_dict(keep_vars=True).items()
        }
        images = torch.empty(_IMAGES, getattr(model, "in_chans", 3), size, size)
        kept = _KeptBytes(state.values())
        # Fused attention is not counted by every version of PyTorch.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, kept.hooks():
            torch.func.functional_call(model, state, images)
    macs = products = 0
    for operation, flops in counter.get_flop_counts()["Global"].items():
        if operation.__name__ in _PRODUCTS:
            products += flops // (2 * _IMAGES)  # a MAC is two operations
        else:
            macs += flops // (2 * _IMAGES)
    return {
        "macs": macs,
        "product_macs": products,
        "neurons": sum(neurons) // _IMAGES,
        "kept_bytes": kept.total // _IMAGES,
    }


def _count_neurons(model: nn.Module) -> list[int]:
    outputs: list[int] = []
    for module in model.modules():
        if isinstance(module, SpikeNeuron | nn.ReLU):
            module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.numel()))
    return outputs


class _KeptBytes:
    """The storages that autograd keeps, each counted once, without those of parameters."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {p.untyped_storage()._cdata for p in parameters}
        self._kept: dict[int, Tensor] = {}

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        if (key := tensor.untyped_storage()._cdata) not in self._parameters:
            self._kept[key] = tensor
        return tensor

    @property
    def total(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


def _table(profiles: list[Profile]) -> Table:
    """The profiles side by side, one model a row."""
    columns = (
        "model", "pixels", "T", "parameters", "MACs", "attention products", "neurons", "kept for backward", "packed",
        "training, one epoch", "directly over T", "share",
    )  # fmt: skip
    result = Table(*columns, title="Per image; an epoch's training is forward and backward")
    for p in profiles:
        direct = p.direct_epoch_macs
        result.add_row(
            p.name,
            str(p.image_size),
            "-" if p.time_steps is None else str(p.time_steps),
            f"{p.parameters / 1e6:.3f} M",
            f"{p.macs / 1e9:.3f} G",
            f"{p.product_macs / 1e9:.3f} G",
            f"{p.neurons / 1e6:.2f} M",
            f"{p.kept_bytes / 2**20:.1f} MiB",
            f"{p.packed_bytes / 2**20:.2f} MiB",
            f"{p.epoch_macs / 1e15:.3f} PMAC",
            "-" if direct is None else f"{direct / 1e15:.3f} PMAC",
            "-" if direct is None else f"{100 * p.epoch_macs / direct:.0f} %",
        )
    return result
