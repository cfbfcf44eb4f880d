"""Recording the queries, keys and values of a network's attention in a forward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qsd.errors import QsdError

PROJECTIONS = ("query", "key", "value")


@dataclass
class AttentionMaps:
    """Queries, keys and values of one attention layer.

    Attributes:
        query: ``[B, heads, d, H, W]``: spike counts of a spiking network, real values of any other.
        key: The same.
        value: The same.
    """

    query: Tensor
    key: Tensor
    value: Tensor


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """The attention layers whose parts can be recorded by name, in the order of registration.

    They have ``num_heads`` and the modules ``q_neuron``, ``k_neuron`` and ``v_neuron``, whose outputs
    ``[B, C, H, W]`` are queries, keys and values with head-major channels. All attention layers of this
    package have them, and those of their float twins.

    Args:
        model: Any module.
    """
    taps = ("num_heads", "q_neuron", "k_neuron", "v_neuron")
    return {name: m for name, m in model.named_modules() if all(hasattr(m, tap) for tap in taps)}


class AttentionRecorder:
    """Record the maps of a network's attention layers in one forward pass, with their gradients' graph.

    It records forward passes between `start` and `take` only: neither validation nor the second forward pass of
    gradient checkpointing.

    Args:
        model: A network with `attention_layers`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = attention_layers(model)
        self._recording = False
        self._maps: dict[tuple[str, str], Tensor] = {}
        # Plain functions, which a deep copy of the network (averaged weights, conversion) shares and does not copy.
        self._handles = [
            getattr(layer, f"{projection[0]}_neuron").register_forward_hook(self._hook(name, projection))
            for name, layer in self.layers.items()
            for projection in PROJECTIONS
        ]

    def _hook(self, name: str, projection: str) -> Callable[..., None]:
        key, heads = (name, projection), self.layers[name].num_heads

        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if self._recording:
                self._maps[key] = output.unflatten(1, (heads, -1))

        return hook

    def start(self) -> None:
        """Start to record."""
        self._maps.clear()
        self._recording = True

    def take(self) -> list[AttentionMaps]:
        """End the recording and return the maps, layer by layer.

        Raises:
            QsdError: If a layer did not run.
        """
        maps, self._recording = dict(self._maps), False
        self._maps.clear()
        missing = next((f"{n}.{p}" for n in self.layers for p in PROJECTIONS if (n, p) not in maps), None)
        if missing is not None:
            raise QsdError(f"attention layer {missing} did not run in the forward pass; distillation needs all layers.")
        return [AttentionMaps(**{p: maps[name, p] for p in PROJECTIONS}) for name in self.layers]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._maps.clear()


class ProductRecorder(TorchFunctionMode):
    """Record query, key and value of every scaled dot product attention in this context.

    The vision transformers of timm compute attention by this function. Queries and keys are recorded as they are
    multiplied, after their norms and rotary embeddings.
    """

    def __init__(self) -> None:
        super().__init__()
        self._products: list[tuple[Tensor, ...]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            self._products.append(tuple(args[i] if i < len(args) else kwargs[n] for i, n in enumerate(names)))
        return func(*args, **kwargs)

    def take(self, images: Tensor, prefix_tokens: int) -> list[AttentionMaps]:
        """The recorded maps, in the order of execution. Layers with different numbers of queries and keys are left out.

        Args:
            images: Input of the network ``[B, C, H, W]``; the tokens form a grid of the same proportions.
            prefix_tokens: Number of class and register tokens before the grid, which are cut off.

        Raises:
            QsdError: If the tokens form no grid, or are those of windows.
        """
        products, self._products = self._products, []
        maps = []
        for product in products:
            batch, tokens = product[0].shape[0], product[0].shape[-2]
            if product[1].shape[-2] != tokens:
                continue
            if batch != len(images):
                raise QsdError(
                    f"the teacher attends within windows ({batch} of them in {len(images)} images); its tokens cannot "
                    "be compared with those of an image. Choose a teacher with global attention, or attention_weight=0."
                )
            cut, grid = _grid(tokens, prefix_tokens, images.shape[-2:])
            maps.append(AttentionMaps(*(x[..., cut:, :].transpose(-1, -2).unflatten(-1, grid) for x in product)))
        return maps


def _grid(tokens: int, prefix_tokens: int, image_size: torch.Size) -> tuple[int, tuple[int, int]]:
    """The number of tokens to cut off, and the height and width of the grid."""
    height, width = image_size
    for cut in (prefix_tokens, 0):  # Some models append their class token later on.
        rows = round(((tokens - cut) * height / width) ** 0.5)
        if rows > 0 and (tokens - cut) % rows == 0 and round(rows * width / height) == (tokens - cut) // rows:
            return cut, (rows, (tokens - cut) // rows)
    raise QsdError(
        f"the teacher's {tokens} tokens ({prefix_tokens} of them class or register tokens) form no grid of the "
        f"proportions of its {height}x{width} images; choose another teacher, or attention_weight=0."
    )
