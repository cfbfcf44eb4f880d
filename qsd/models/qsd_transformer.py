"""QSD-Transformer: a hierarchy of convolutional and attention stages on spike counts.

Qiu et al., "Quantized Spike-driven Transformer", ICLR 2025 (https://arxiv.org/abs/2501.13492). Layer order and numbers
follow the published classification code; its gaps (stochastic depth without effect, dead parameters, a fixed T) are
filled.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from qsd.layers import ConvBlock, Downsample, TransformerBlock
from qsd.layers.attention import AttentionKind
from qsd.models.staged import Stage, StagedClassifier, check_stages, drop_path_rates, split_depth
from qsd.neurons import build_neuron


class QsdTransformer(StagedClassifier):
    """QSD-Transformer for images ``[B, in_chans, H, W]``, any size from the total stride upwards.

    Activations are spike counts of a window of ``time_steps``; there is no time axis before conversion. Stages have
    the strides 4, 8, 16, 16 relative to the image.

    Args:
        embed_dims: Channels of the four stages; the stem has half of the first.
        depth: Number of transformer blocks: three quarters of them (rounded down) in stage 3, one quarter (rounded
            down) in stage 4.
        num_heads: Number of attention heads, in both attention stages.
        mlp_ratio: Channels inside MLPs and dense convolution pairs, over the block's channels.
        num_classes: Outputs of the classifier; 0 removes it.
        in_chans: Channels of the image.
        time_steps: T, the largest spike count of a neuron per image; 0 or ``None`` for ReLUs instead of neurons.
            (``timm.create_model`` drops arguments that are ``None``: pass 0 there.)
        weight_bits: 2 to 8, or 0 or ``None`` for float weights.
        attention: ``"linear"``, or ``"softmax"`` in a float twin.
        layer_scale: Initial scale of the transformer blocks' branches.
        branch_scale: Initial weight of the batch norm that ends each branch of the convolutional blocks (published: 1).
        norm_scale: Factor of the initial weights of all batch norms, after ``branch_scale`` (published: 1).
            Smaller values keep membranes within the window of the neurons, and a training from scratch learns faster.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last transformer block; it grows linearly from 0 at the first.
        strides: Strides of the five down-samplings; ``(1, 1, 2, 2, 1)`` suits images of 32 pixels.
        global_pool: ``"avg"``, the only choice; part of timm's contract.

    Raises:
        QsdError: For sizes that do not fit together.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 256, 360),
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        time_steps: int | None = 4,
        weight_bits: int | None = 4,
        attention: AttentionKind = "linear",
        layer_scale: float = 1e-6,
        branch_scale: float = 1.0,
        norm_scale: float = 1.0,
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
        kinds: dict[str, Any] = {"time_steps": time_steps, "weight_bits": weight_bits}
        options: dict[str, Any] = {"num_heads": num_heads, "mlp_ratio": mlp_ratio, "attention": attention, **kinds}
        convolutional: Callable[[int], nn.Module] = partial(
            ConvBlock, mlp_ratio=mlp_ratio, branch_scale=branch_scale, **kinds
        )
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))

        def attending(dim: int) -> nn.Module:
            return TransformerBlock(dim, layer_scale=layer_scale, drop_path_rate=next(rates), **options)

        dims = [embed_dims[0] // 2, *embed_dims]
        first = Downsample(in_chans, dims[0], kernel_size=7, stride=strides[0], first=True, **kinds)
        self.stem, self.stages = Stage(first, [convolutional(dims[0])]), nn.ModuleList()
        blocks = [(convolutional, 1), (convolutional, 2), (attending, depths[0]), (attending, depths[1])]
        for dim, width, stride, (block, number) in zip(dims, embed_dims, strides[1:], blocks):
            downsample = Downsample(dim, width, stride=stride, **kinds)
            self.stages.append(Stage(downsample, [block(width) for _ in range(number)]))
        self.head_neuron, self.head = build_neuron(time_steps), self.build_head(num_classes)
        self.describe_stages(embed_dims, strides)
        _scale_norms(self, norm_scale)


def _scale_norms(model: nn.Module, factor: float) -> None:
    """Multiply the weights of all batch norms: one membrane in six of variance 1 is above T thresholds."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.mul_(factor)
