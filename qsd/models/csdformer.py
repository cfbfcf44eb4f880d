"""CSDformer: a transformer designed for lossless conversion to binary spikes.

Zhang et al., "CSDformer: A Conversion Method for Fully Spike-Driven Transformer", 2025
(https://arxiv.org/abs/2509.17461). The skeleton is Spikingformer's, by the paper's parameter counts: a convolutional
tokenizer with max-pooling, batch norms only, ReLU over N in place of the softmax. The paper leaves open whether a
neuron stands in front of the head; here one does, so that the head too sees spikes.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from qsd.errors import QsdError
from qsd.functional import drop_path
from qsd.layers import Mlp, NReluSelfAttention, SpikeMaxPool2d, TokenMean, TokenMeanLinear, conv_norm, recompute
from qsd.layers.attention import ScoreKind
from qsd.models.base import ImageClassifier
from qsd.models.staged import drop_path_rates
from qsd.neurons import build_neuron, neuron_kinds

# A kind of neuron with a learned step (see `qsd.neurons.register_neuron`), or ``"relu"`` for the float network.
Activation = str


class PooledConv(nn.Module):
    """A stage of the tokenizer: neuron, max-pool of the spike counts (if it has a stride), 3x3 convolution and norm.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the pool, 1 for none.
        kinds: Arguments ``time_steps``, ``weight_bits`` and ``neurons``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, kinds: dict[str, Any]) -> None:
        super().__init__()
        self.neuron = build_neuron(kinds["time_steps"], kind=kinds["neurons"])
        self.pool = nn.Identity() if stride == 1 else SpikeMaxPool2d(3, stride, padding=1)
        self.proj = conv_norm(in_channels, out_channels, 3, bits=kinds["weight_bits"])

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` to ``[B, C_out, H', W']``."""
        return self.proj(self.pool(self.neuron(x)))


class CsdBlock(nn.Module):
    """Residual attention and residual MLP.

    Args:
        dim: Number of channels.
        num_heads: Number of attention heads.
        mlp_ratio: Channels inside the MLP, over ``dim``.
        attention: ``"nrelu"`` or ``"softmax"``, see `NReluSelfAttention`.
        drop_path_rate: Probability of dropping a branch in training, per image.
        kinds: Arguments ``time_steps``, ``weight_bits`` and ``neurons``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        attention: ScoreKind,
        drop_path_rate: float,
        kinds: dict[str, Any],
    ) -> None:
        super().__init__()
        self.attn = NReluSelfAttention(dim, num_heads, attention=attention, **kinds)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), 1, True, **kinds)
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        x = x + drop_path(self.attn(x), self.drop_path_rate, self.training)
        return x + drop_path(self.mlp(x), self.drop_path_rate, self.training)


def _check_arguments(activation: str, embed_dims: object, depth: int, mlp_ratio: float, strides: Sequence[int]) -> None:
    learned = [kind for kind in neuron_kinds() if kind != "fixed"]
    if activation not in (*learned, "relu"):
        names = ", ".join(repr(kind) for kind in learned)
        raise QsdError(f"activation={activation!r} is unknown; use {names} or 'relu'.")
    if not isinstance(embed_dims, int) or embed_dims < 8 or embed_dims % 8:
        raise QsdError(f"embed_dims={embed_dims!r} is no positive multiple of 8.")
    if depth < 1:
        raise QsdError(f"depth={depth} leaves no block.")
    if mlp_ratio * embed_dims < 1:
        raise QsdError(f"mlp_ratio={mlp_ratio} leaves no channels inside the MLPs.")
    if len(strides) != 4 or min(strides) < 1:
        raise QsdError(f"strides={tuple(strides)}: four positive strides are needed, one per pool.")


class CsdFormer(ImageClassifier):
    """CSDformer for images ``[B, in_chans, H, W]``, any size and shape from the total stride upwards.

    There is no positional embedding. All blocks work on one grid of tokens, the output of the tokenizer's pools.

    Args:
        embed_dims: Channels D of the blocks; the tokenizer's five convolutions have D/8, D/4, D/2, D and D.
        depth: Number of transformer blocks.
        num_heads: Number of attention heads.
        mlp_ratio: Channels inside the MLPs, over D.
        num_classes: Outputs of the classifier; 0 removes it.
        in_chans: Channels of the image.
        time_steps: T, the largest spike count of a neuron per image; 0 or ``None`` for ReLUs instead of neurons.
        weight_bits: 2 to 8, or 0 or ``None`` for float weights, the paper's choice.
        activation: ``"lsq"`` (a learned step, the paper's choice), ``"qcfs"``, ``"relu"`` for the float network, or a
            kind of learned step of one's own, see `qsd.neurons.register_neuron`.
        attention: ``"nrelu"``, or ``"softmax"`` in a float network.
        strides: Strides of the four max-pools, 1 for none; ``(1, 1, 2, 2)`` suits images of 32 pixels.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        global_pool: ``"avg"``, the only choice; part of timm's contract.

    Raises:
        QsdError: For sizes that do not fit together.
    """

    features_name = "blocks"

    def __init__(
        self,
        embed_dims: int = 384,
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        time_steps: int | None = 4,
        weight_bits: int | None = None,
        activation: Activation = "lsq",
        attention: ScoreKind = "nrelu",
        strides: Sequence[int] = (2, 2, 2, 2),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: Literal["avg"] = "avg",
    ) -> None:
        _check_arguments(activation, embed_dims, depth, mlp_ratio, strides)
        time_steps = None if activation == "relu" else time_steps or None
        weight_bits = weight_bits or None
        super().__init__(
            embed_dims, num_classes, in_chans, time_steps, weight_bits, drop_rate, drop_path_rate, global_pool
        )
        self.activation: Activation = "relu" if time_steps is None else activation
        neurons = "lsq" if activation == "relu" else activation
        kinds: dict[str, Any] = {"time_steps": time_steps, "weight_bits": weight_bits, "neurons": neurons}
        widths = (embed_dims // 8, embed_dims // 4, embed_dims // 2, embed_dims, embed_dims)
        self.stem = nn.Sequential(
            conv_norm(in_chans, widths[0], 3, bits=weight_bits),
            *(PooledConv(widths[i], widths[i + 1], strides[i], kinds) for i in range(4)),
        )
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            CsdBlock(embed_dims, num_heads, mlp_ratio, attention, rate, kinds) for rate in rates
        )
        self.head_neuron = build_neuron(time_steps, kind=neurons)
        self.pool = TokenMean()
        self.head = self.build_head(num_classes)

        self.total_stride = math.prod(strides)
        self.feature_info = [
            {"num_chs": embed_dims, "reduction": self.total_stride, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.grad_checkpointing = False

    def build_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        return TokenMeanLinear(self.num_features, num_classes, self.weight_bits, self.drop_rate)

    def run_features(self, module: nn.Module, x: Tensor) -> Tensor:
        return recompute(module, x) if self.grad_checkpointing and self.training else module(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features ``[B, C, H', W']`` to logits ``[B, num_classes]``.

        Args:
            x: Output of `forward_features`.
            pre_logits: Whether to stop in front of the classifier, at the mean over the tokens ``[B, C]``.
        """
        x = self.head_neuron(x)
        if pre_logits or self.num_classes == 0:
            return F.dropout(self.pool(x), self.drop_rate, self.training)
        return self.head(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into groups by depth, for layer-wise learning rates.

        Args:
            coarse: Whether to form one group for all blocks.
        """
        return {"stem": r"^stem", "blocks": r"^blocks" if coarse else r"^blocks\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations.

        Args:
            enable: Whether to switch it on or off.
        """
        self.grad_checkpointing = enable
