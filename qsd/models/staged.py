"""The base of classifiers that are a stem and a row of stages, each a down-sampling and blocks."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from qsd.errors import QsdError
from qsd.layers import Downsample, recompute
from qsd.models.base import ImageClassifier


class Stage(nn.Module):
    """A down-sampling and the blocks after it.

    Args:
        downsample: Changes channels and size.
        blocks: Keep channels and size.
    """

    def __init__(self, downsample: Downsample, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` to ``[B, C_out, H', W']``."""
        x = self.downsample(x)
        for block in self.blocks:
            x = recompute(block, x) if self.grad_checkpointing and self.training else block(x)
        return x


class StagedClassifier(ImageClassifier):
    """A classifier whose features are those of its stages; the stem is a stage too.

    A subclass builds ``stem``, ``stages``, ``head_neuron`` and ``head``, and calls `describe_stages`.
    """

    features_name = "stages"
    stem: Stage
    stages: nn.ModuleList
    head_neuron: nn.Module

    def describe_stages(self, embed_dims: Sequence[int], strides: Sequence[int]) -> None:
        """Set ``feature_info`` and ``total_stride``.

        Args:
            embed_dims: Channels of the stages.
            strides: Stride of the stem, then of each stage.
        """
        self.feature_info = [
            {"num_chs": dim, "reduction": prod(strides[: i + 2]), "module": f"stages.{i}"}
            for i, dim in enumerate(embed_dims)
        ]
        self.total_stride = prod(strides)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features ``[B, C, H', W']`` to logits ``[B, num_classes]``.

        Args:
            x: Output of `forward_features`.
            pre_logits: Whether to stop in front of the classifier, at the head neuron's output ``[B, C]``.
        """
        x = self.head_neuron(x.mean(dim=(2, 3)))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into groups by depth, for layer-wise learning rates.

        Args:
            coarse: Whether to form a group per stage instead of per block.
        """
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        blocks = r"^stages\.(\d+)" if coarse else fine
        return {"stem": r"^stem", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations.

        Args:
            enable: Whether to switch it on or off.
        """
        for stage in (self.stem, *self.stages):
            stage.grad_checkpointing = enable


def check_stages(
    embed_dims: Sequence[int], num_heads: int, mlp_ratio: float, strides: Sequence[int], stages: int = 4
) -> None:
    """Refuse sizes that do not fit together.

    Args:
        embed_dims: Channels of the stages; those from the third on have attention.
        num_heads: Number of attention heads.
        mlp_ratio: Channels between the convolutions of a pair, over the block's channels.
        strides: Stride of the stem, then of each stage.
        stages: Number of stages.

    Raises:
        QsdError: With the argument and its value.
    """
    words = {3: "three", 4: "four", 5: "five"}
    if len(embed_dims) != stages or min(embed_dims) < 1 or embed_dims[0] % 2:
        raise QsdError(
            f"embed_dims={tuple(embed_dims)}: {words[stages]} positive sizes are needed, the first one even."
        )
    if num_heads < 1:
        raise QsdError(f"num_heads={num_heads} is not positive.")
    for i in range(2, stages):
        if embed_dims[i] % num_heads:
            raise QsdError(
                f"embed_dims[{i}]={embed_dims[i]} is not divisible by num_heads={num_heads}; "
                f"pick a multiple of {num_heads}."
            )
    if mlp_ratio * min(embed_dims[0] // 2, *embed_dims) < 1:
        raise QsdError(f"mlp_ratio={mlp_ratio} leaves no channels inside the MLPs.")
    if len(strides) != stages + 1 or min(strides) < 1:
        raise QsdError(
            f"strides={tuple(strides)}: {words[stages + 1]} positive strides are needed, one per down-sampling."
        )


def split_depth(depth: int) -> tuple[int, int]:
    """The numbers of blocks in stages 3 and 4: three quarters and one quarter, both rounded down.

    Args:
        depth: Number of blocks.

    Raises:
        QsdError: If no block is left for one of them.
    """
    if depth < 2:
        raise QsdError(f"depth={depth} leaves no transformer block; use 2 or more (a multiple of 4 divides evenly).")
    return depth * 3 // 4, depth // 4


def drop_path_rates(largest: float, depth: int) -> list[float]:
    """Rates of stochastic depth that grow linearly from 0 at the first block.

    Args:
        largest: Rate of the last block.
        depth: Number of blocks.
    """
    return [largest * i / max(depth - 1, 1) for i in range(depth)]
