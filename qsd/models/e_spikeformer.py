"""E-SpikeFormer (Spike-driven Transformer V3): the base network of 5 to 19 million parameters, and the large one.

Yao, Qiu et al., "Scaling Spike-driven Transformer with Efficient Spike Firing Approximation Training", IEEE TPAMI
47(4), 2025 (https://arxiv.org/abs/2411.16061). Layers and numbers follow the published classification code, which
holds two different networks. Stochastic depth, which the published base network does not apply, other T and low-bit
weights are this package's.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from qsd.errors import QsdError
from qsd.layers import Downsample, QuantLinear, initialize_steps
from qsd.layers.e_spikeformer import ESpikeBlock, SpikeConvBlock, UnitNeurons
from qsd.models.staged import Stage, StagedClassifier, check_stages, drop_path_rates, split_depth
from qsd.neurons import Rounding, Window, build_neuron


class ESpikeFormer(StagedClassifier):
    """The base network of E-SpikeFormer for images ``[B, in_chans, H, W]``, any size from the total stride upwards.

    A neuron stands in front of every convolution and of the head, so that the converted network is spike-driven
    without merging. Stages have the strides 4, 8, 16, 16 relative to the image.

    Args:
        embed_dims: Channels of the four stages; the stem has half of the first.
        depth: Number of transformer blocks: three quarters of them (rounded down) in stage 3, one quarter (rounded
            down) in stage 4.
        num_heads: Number of attention heads, in both attention stages.
        mlp_ratio: Channels inside MLPs and dense convolution pairs, over the block's channels.
        value_ratio: Channels of the values of attention, over the block's channels.
        num_classes: Outputs of the classifier; 0 removes it.
        in_chans: Channels of the image.
        time_steps: T, the largest spike count of a neuron per image (D in the paper); 0 or ``None`` for ReLUs instead
            of neurons. (``timm.create_model`` drops arguments that are ``None``: pass 0 there.)
        weight_bits: 2 to 8, or 0 or ``None`` for float weights, the paper's choice.
        rounding: ``"half_up"``, or ``"half_even"`` as in the published base network, see `qsd.neurons.SpikeNeuron`.
        window: Window of the gradient, ``"open"`` or ``"closed"``; ``None`` for that of the rounding.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last transformer block; it grows linearly from 0 at the first.
        strides: Strides of the five down-samplings; ``(1, 1, 2, 2, 1)`` suits images of 32 pixels.
        global_pool: ``"avg"``, the only choice; part of timm's contract.

    Raises:
        QsdError: For sizes that do not fit together.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (32, 64, 128, 192),
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        value_ratio: int = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
        time_steps: int | None = 4,
        weight_bits: int | None = None,
        rounding: Rounding = "half_up",
        window: Window | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        strides: Sequence[int] = (2, 2, 2, 2, 1),
        global_pool: Literal["avg"] = "avg",
    ) -> None:
        check_stages(embed_dims, num_heads, mlp_ratio, strides)
        depths = split_depth(depth)
        time_steps, weight_bits = time_steps or None, weight_bits or None
        super().__init__(
            embed_dims[-1], num_classes, in_chans, time_steps, weight_bits, drop_rate, drop_path_rate, global_pool
        )
        kinds = _kinds(time_steps, weight_bits, rounding, window)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))

        def blocks(dim: int, number: int) -> list[nn.Module]:
            sizes = (dim, num_heads, mlp_ratio, value_ratio)
            return [ESpikeBlock(*sizes, False, None, next(rates), kinds) for _ in range(number)]

        parts = _conv_blocks(embed_dims, mlp_ratio, True, kinds)
        parts += [blocks(embed_dims[2], depths[0]), blocks(embed_dims[3], depths[1])]
        self.stem, *stages = _build_stages(in_chans, embed_dims, strides, parts, kinds)
        self.stages = nn.ModuleList(stages)
        self.head_neuron = build_neuron(time_steps, None, 1.0, kinds["neurons"])
        self.head = self.build_head(num_classes)
        self.describe_stages(embed_dims, strides)


class ESpikeFormerLarge(StagedClassifier):
    """The large network of E-SpikeFormer, three stages of the strides 4, 8, 16, for images ``[B, in_chans, H, W]``.

    Its projections are pairs of pointwise convolutions, which merge into smaller ones at conversion. In training it
    returns the logits of two heads, the second one to be taught by a teacher; in evaluation their average. The first
    head of the published network sees the mean of the residual stream, real values: the audit names it. With
    ``spiking_head`` both heads see spikes.

    Args:
        embed_dims: Channels of the three stages; the stem has half of the first.
        depth: Number of transformer blocks, all in stage 3.
        num_heads: Number of attention heads.
        mlp_ratio: Channels inside MLPs and dense convolution pairs, over the block's channels.
        value_ratio: Channels of the values of attention, over the block's channels.
        num_classes: Outputs of each classifier; 0 removes them.
        in_chans: Channels of the image.
        time_steps: T, see `ESpikeFormer`.
        weight_bits: 2 to 8, or 0 or ``None`` for float weights, the paper's choice.
        rounding: ``"half_up"`` as published, or ``"half_even"``, see `qsd.neurons.SpikeNeuron`.
        window: Window of the gradient, ``"open"`` or ``"closed"``; ``None`` for that of the rounding.
        layer_scale: Initial scale of the transformer blocks' branches.
        distilled: Whether there is a second head.
        spiking_head: Whether the first head sees the spikes of the head neuron, as the second does.
        drop_rate: Dropout in front of the classifiers.
        drop_path_rate: Stochastic depth of the last transformer block; it grows linearly from 0 at the first.
        strides: Strides of the four down-samplings.
        global_pool: ``"avg"``, the only choice; part of timm's contract.

    Raises:
        QsdError: For sizes that do not fit together.
    """

    head_kd: nn.Module | None

    def __init__(
        self,
        embed_dims: Sequence[int] = (128, 256, 512),
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        value_ratio: int = 1,
        num_classes: int = 1000,
        in_chans: int = 3,
        time_steps: int | None = 4,
        weight_bits: int | None = None,
        rounding: Rounding = "half_up",
        window: Window | None = None,
        layer_scale: float = 1e-6,
        distilled: bool = True,
        spiking_head: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        strides: Sequence[int] = (2, 2, 2, 2),
        global_pool: Literal["avg"] = "avg",
    ) -> None:
        check_stages(embed_dims, num_heads, mlp_ratio, strides, stages=3)
        if depth < 1:
            raise QsdError(f"depth={depth} leaves no transformer block.")
        time_steps, weight_bits = time_steps or None, weight_bits or None
        super().__init__(
            embed_dims[-1], num_classes, in_chans, time_steps, weight_bits, drop_rate, drop_path_rate, global_pool
        )
        kinds = _kinds(time_steps, weight_bits, rounding, window)
        sizes = (embed_dims[2], num_heads, mlp_ratio, value_ratio)
        rates = drop_path_rates(drop_path_rate, depth)
        parts = _conv_blocks(embed_dims, mlp_ratio, False, kinds)
        parts.append([ESpikeBlock(*sizes, True, layer_scale, rate, kinds) for rate in rates])
        self.stem, *stages = _build_stages(in_chans, embed_dims, strides, parts, kinds)
        self.stages = nn.ModuleList(stages)
        self.spiking_head, self.distilled_training = spiking_head, distilled
        fires = spiking_head or distilled
        self.head_neuron = build_neuron(time_steps, None, 1.0, kinds["neurons"]) if fires else nn.Identity()
        self.head = self.build_head(num_classes)
        self.head_kd = self.build_head(num_classes) if distilled else None
        self.describe_stages(embed_dims, strides)

    def build_head(self, num_classes: int) -> nn.Module:
        head = super().build_head(num_classes)
        if isinstance(head, QuantLinear):
            nn.init.xavier_uniform_(head.weight)
            initialize_steps(head)
        return head

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Features ``[B, C, H', W']`` to logits ``[B, num_classes]``; in training with two heads to a pair of them.

        Args:
            x: Output of `forward_features`.
            pre_logits: Whether to stop in front of the classifiers, at the mean of the tokens ``[B, C]``.
        """
        x = F.dropout(x.mean(dim=(2, 3)), self.drop_rate, self.training)
        if pre_logits or self.num_classes == 0:
            return x
        spikes = self.head_neuron(x)
        logits = self.head(spikes if self.spiking_head else x)
        if self.head_kd is None:
            return logits
        taught = self.head_kd(spikes)
        return (logits, taught) if self.training and self.distilled_training else (logits + taught) / 2

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether training returns the logits of both heads as a pair, instead of their average.

        Args:
            enable: Whether to switch it on or off.
        """
        self.distilled_training = enable and self.head_kd is not None

    def get_classifier(self) -> Any:
        """The classifier, or the pair of classifiers."""
        return self.head if self.head_kd is None else (self.head, self.head_kd)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.head_kd is not None:
            reference = next(self.parameters())
            self.head_kd = self.build_head(num_classes).to(device=reference.device, dtype=reference.dtype)


def _kinds(
    time_steps: int | None, weight_bits: int | None, rounding: Rounding, window: Window | None
) -> dict[str, Any]:
    neurons = UnitNeurons(rounding, window)
    neurons(time_steps or 1, None, None)  # refuses an unknown option in a float twin too
    return {"time_steps": time_steps, "weight_bits": weight_bits, "neurons": neurons}


def _conv_blocks(
    embed_dims: Sequence[int], mlp_ratio: float, separable: bool, kinds: dict[str, Any]
) -> list[list[nn.Module]]:
    """The blocks of the stem and of the first two stages."""
    counts = ((embed_dims[0] // 2, 1), (embed_dims[0], 1), (embed_dims[1], 2))
    return [[SpikeConvBlock(dim, mlp_ratio, separable, kinds) for _ in range(number)] for dim, number in counts]


def _build_stages(
    in_chans: int,
    embed_dims: Sequence[int],
    strides: Sequence[int],
    blocks: Sequence[list[nn.Module]],
    kinds: dict[str, Any],
) -> list[Stage]:
    """The stem and the stages, each with its down-sampling in front of its blocks."""
    channels = [in_chans, embed_dims[0] // 2, *embed_dims]
    stages = []
    for i, (stride, row) in enumerate(zip(strides, blocks)):
        first = i == 0
        down = Downsample(channels[i], channels[i + 1], 7 if first else 3, stride, first, **kinds)
        stages.append(Stage(down, row))
    return stages
