"""A converted network as an ONNX graph in the count domain: one pass, no time axis, any number of images."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.spiking import SpikingNetwork
from qsd.spiking.layers import (
    DelayedNeuron,
    SpikingChain,
    SpikingDense,
    SpikingMaxPool,
    SpikingPooledDense,
    TimedLayer,
)

DOMAIN = "qsd"  # of nodes that stand for a layer of ours until it is written out


def check_target(spiking: SpikingNetwork, path: Path) -> None:
    """Refuse what cannot be written, before work begins.

    Args:
        spiking: the network.
        path: file to write.

    Raises:
        QsdError: if the folder is missing, or a neuron's delay is below T - 1.
    """
    if not path.parent.is_dir():
        raise QsdError(f"the folder {path.parent} does not exist; make it first.")
    early = next((name for name, neuron in spiking.neurons().items() if neuron.delay < spiking.time_steps - 1), None)
    if early is not None:
        raise QsdError(
            f"neuron {early} fires before its input is complete, and no file tells what it does then; convert with the "
            "lossless delays, delay=None."
        )


def trace(spiking: SpikingNetwork, example: Tensor, whole_layers: bool) -> Any:
    """The graph, as an ONNX model with inputs ``images`` and outputs ``logits``.

    Args:
        spiking: the network; it is not changed.
        example: images ``[B, C, H, W]``, whose height and width the graph will have.
        whole_layers: one node of the domain ``qsd`` for every layer of ours, named by the attribute ``layer``.

    Raises:
        QsdError: if the packages for it are missing.
    """
    try:
        import onnxscript  # noqa: F401 - what torch writes ONNX with
    except ImportError as error:
        raise QsdError("writing ONNX files needs more packages: pip install 'qsd[export]'.") from error
    network = copy.deepcopy(spiking).cpu().float().network
    images = example[:1].cpu().float().expand(2, -1, -1, -1).clone()  # with one image, one is taken for all
    if whole_layers:
        _replace_layers(network, _output_shapes(network, images))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    return program.model_proto


@torch.no_grad()
def _output_shapes(network: nn.Module, images: Tensor) -> dict[nn.Module, tuple[int, ...]]:
    """Of every layer of ours, for one image."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    handles = [
        layer.register_forward_hook(lambda layer, _, output: shapes.__setitem__(layer, output.shape[1:]))
        for layer in network.modules()
        if isinstance(layer, TimedLayer)
    ]
    output = network(images)
    if not isinstance(output, Tensor):
        raise QsdError("only classifiers, which return one tensor, can be written as ONNX files.")
    for handle in handles:
        handle.remove()
    return shapes


def _replace_layers(module: nn.Module, shapes: dict[nn.Module, tuple[int, ...]]) -> None:
    for key, child in list(module.named_children()):
        kind = next((kind for layer, kind in _KINDS.items() if isinstance(child, layer)), None)
        if kind is None:
            _replace_layers(child, shapes)
        else:
            setattr(module, key, kind(child, shapes[child]))


class _Layer(nn.Module):
    """A layer as one node. What it was is kept out of torch's sight, so that its weights do not get into the graph."""

    def __init__(self, layer: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._layer, self._shape = [layer], shape

    def node(self, kind: str, x: Tensor, dtype: torch.dtype = torch.float32, **more: Any) -> Tensor:
        """The node.

        Args:
            kind: its type.
            x: its input.
            dtype: of its output.
            more: attributes.
        """
        attributes, shape = {"layer": self._layer[0].name, **more}, [x.shape[0], *self._shape]
        return torch.onnx.ops.symbolic(f"{DOMAIN}::{kind}", (x,), attributes, dtype=dtype, shape=shape, version=1)


class _Neuron(_Layer):
    """Currents to counts, uint8."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        neuron = self._layer[0]
        counts = self.node("Neuron", x, torch.uint8, threshold=float(neuron.threshold / scale))
        return counts.float() * neuron.amplitude if neuron.scaled else counts

    def worth(self, features: int) -> float:
        """See `DelayedNeuron`."""
        return self._layer[0].worth(features)


class _Chain(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.node("Chain", x)


class _Dense(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.node("Dense", x)


class _PooledDense(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.node("Dense", x.float().mean(dim=(2, 3)))


class _MaxPool(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.node("MaxPool", x, x.dtype)


_KINDS: dict[type[nn.Module], type[_Layer]] = {
    DelayedNeuron: _Neuron,
    SpikingChain: _Chain,
    SpikingPooledDense: _PooledDense,  # before what it is a case of
    SpikingDense: _Dense,
    SpikingMaxPool: _MaxPool,
}
