"""QSD-Transformer: a hierarchy of convolutional and attention stages on spike counts.

Qiu et al., "Quantized Spike-driven Transformer", ICLR 2025 (https://arxiv.org/abs/2501.13492). Layer order and numbers
follow the published classification code; its gaps (stochastic depth without effect, dead parameters, a fixed T) are
filled.
"""

from collections.abc import Sequence
from typing import Any, Literal

from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from qsd.errors import QsdError
from qsd.layers import ConvBlock, Downsample, QuantLinear, TransformerBlock, recompute
from qsd.layers.attention import AttentionKind
from qsd.neurons import build_neuron


class Stage(nn.Module):
    """A down-sampling and the blocks behind it.

    Args:
        downsample: changes channels and size.
        blocks: keep them.
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


class QsdTransformer(nn.Module):
    """QSD-Transformer for images ``[B, in_chans, H, W]``, any size from the total stride upwards.

    Activations are spike counts of a window of ``time_steps``; there is no time axis before conversion. Stages have
    the strides 4, 8, 16, 16 relative to the image.

    Args:
        embed_dims: channels of the four stages; the stem has half of the first.
        depth: transformer blocks; three quarters (rounded down) in stage 3, one quarter (rounded down) in stage 4.
        num_heads: attention heads, in both attention stages.
        mlp_ratio: channels inside MLPs and dense convolution pairs, over the block's channels.
        num_classes: outputs of the classifier; 0 removes it.
        in_chans: channels of the image.
        time_steps: T, the most spikes a neuron fires per image; 0 or ``None`` for ReLUs instead of neurons. (Where
            ``timm.create_model`` is asked, 0: it drops arguments that are ``None``.)
        weight_bits: 2 to 8, or 0 or ``None`` for float weights.
        attention: ``"linear"``, or ``"softmax"`` in a float twin.
        layer_scale: initial scale of the transformer blocks' branches.
        drop_rate: dropout in front of the classifier.
        drop_path_rate: stochastic depth of the last transformer block; it grows linearly from 0 at the first.
        strides: strides of the five down-samplings; ``(1, 1, 2, 2, 1)`` suits images of 32 pixels.
        global_pool: ``"avg"``; here for timm's sake.

    Raises:
        QsdError: for sizes that do not fit together.
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
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        strides: Sequence[int] = (2, 2, 2, 2, 1),
        global_pool: Literal["avg"] = "avg",
    ) -> None:
        super().__init__()
        _check_sizes(embed_dims, depth, num_heads, mlp_ratio, num_classes, strides, drop_path_rate, global_pool)
        time_steps, weight_bits = time_steps or None, weight_bits or None
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.time_steps = time_steps
        self.weight_bits = weight_bits
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.drop_rate = drop_rate
        kinds: dict[str, Any] = {"time_steps": time_steps, "weight_bits": weight_bits}
        depths = (depth * 3 // 4, depth // 4)
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]

        def transformer_blocks(dim: int, rates: list[float]) -> list[nn.Module]:
            return [
                TransformerBlock(
                    dim, num_heads, mlp_ratio, attention=attention, layer_scale=layer_scale, drop_path_rate=r, **kinds
                )
                for r in rates
            ]

        d0, d1, d2, d3 = embed_dims
        self.stem = Stage(
            Downsample(in_chans, d0 // 2, kernel_size=7, stride=strides[0], first=True, **kinds),
            [ConvBlock(d0 // 2, mlp_ratio, **kinds)],
        )
        self.stages = nn.ModuleList(
            [
                Stage(Downsample(d0 // 2, d0, stride=strides[1], **kinds), [ConvBlock(d0, mlp_ratio, **kinds)]),
                Stage(
                    Downsample(d0, d1, stride=strides[2], **kinds),
                    [ConvBlock(d1, mlp_ratio, **kinds) for _ in range(2)],
                ),
                Stage(Downsample(d1, d2, stride=strides[3], **kinds), transformer_blocks(d2, rates[: depths[0]])),
                Stage(Downsample(d2, d3, stride=strides[4], **kinds), transformer_blocks(d3, rates[depths[0] :])),
            ]
        )
        self.head_neuron = build_neuron(time_steps)
        self.head = self._build_head(num_classes)

        reduction = strides[0]
        self.feature_info: list[dict[str, Any]] = []
        for i, dim in enumerate(embed_dims):
            reduction *= strides[i + 1]
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self.total_stride = reduction

    def _build_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        return QuantLinear(self.num_features, num_classes, weight_bits=self.weight_bits)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, H, W]`` to the residual stream behind the last stage, ``[B, C, H/16, W/16]``.

        Raises:
            QsdError: if the image has another number of channels or is smaller than the total stride.
        """
        x = self._forward_stem(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def _forward_stem(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[-3:]
        if channels != self.in_chans:
            raise QsdError(f"images have {channels} channels, the network expects in_chans={self.in_chans}.")
        if height < self.total_stride or width < self.total_stride:
            raise QsdError(
                f"images of {height}x{width} pixels are smaller than the network's total stride {self.total_stride}; "
                f"resize them to at least {self.total_stride}x{self.total_stride} or pass smaller strides."
            )
        return self.stem(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features ``[B, C, H', W']`` to logits ``[B, num_classes]``.

        Args:
            x: what `forward_features` returns.
            pre_logits: stop in front of the classifier, at the head neuron's output ``[B, C]``.
        """
        x = self.head_neuron(x.mean(dim=(2, 3)))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen stages, as timm's models return them.

        Args:
            x: images ``[B, in_chans, H, W]``.
            indices: stages to return (0 to 3), or how many of the last; ``None`` for all.
            norm: must be false: there is no norm behind the last stage.
            stop_early: do not run stages behind the last one asked for.
            output_fmt: ``"NCHW"``.
            intermediates_only: return the list alone.

        Returns:
            The list of features ``[B, C, H', W']``, after the last stage's features unless ``intermediates_only``.
        """
        if output_fmt != "NCHW" or norm:
            raise QsdError(f"output_fmt={output_fmt!r}, norm={norm}: only output_fmt='NCHW' without norm exists here.")
        taken, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self._forward_stem(x)
        for i, stage in enumerate(self.stages):
            if stop_early and i > last:
                break
            x = stage(x)
            if i in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages behind the last one in ``indices``, and the head.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: without effect: there is no norm behind the last stage.
            prune_head: remove the classifier.

        Returns:
            The indices of the stages asked for.
        """
        del prune_norm
        taken, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        self.total_stride = self.feature_info[last]["reduction"]
        if prune_head:
            self.reset_classifier(0)
        return taken

    def get_classifier(self) -> nn.Module:
        """The classifier, `QuantLinear` or identity."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put in a fresh classifier.

        Args:
            num_classes: its outputs; 0 for none.
            global_pool: ``"avg"`` or ``None``.
        """
        if num_classes < 0 or global_pool not in (None, "avg"):
            raise QsdError(f"num_classes={num_classes}, global_pool={global_pool!r}: use num_classes >= 0 and 'avg'.")
        self.num_classes = num_classes
        reference = next(self.parameters())
        self.head = self._build_head(num_classes).to(device=reference.device, dtype=reference.dtype)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must not touch: step sizes and layer scales."""
        return {name for name, _ in self.named_parameters() if name.endswith((".step", "layer_scale1", "layer_scale2"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into groups by depth, for layer-wise learning rates.

        Args:
            coarse: a group per stage instead of per block.
        """
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        blocks = r"^stages\.(\d+)" if coarse else fine
        return {"stem": r"^stem", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations.

        Args:
            enable: switch it on or off.
        """
        for stage in (self.stem, *self.stages):
            stage.grad_checkpointing = enable


def _check_sizes(
    embed_dims: Sequence[int],
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    num_classes: int,
    strides: Sequence[int],
    drop_path_rate: float,
    global_pool: str,
) -> None:
    if len(embed_dims) != 4 or min(embed_dims) < 1 or embed_dims[0] % 2:
        raise QsdError(f"embed_dims={tuple(embed_dims)}: four positive sizes are needed, the first one even.")
    if num_heads < 1:
        raise QsdError(f"num_heads={num_heads} is not positive.")
    for i in (2, 3):
        if embed_dims[i] % num_heads:
            raise QsdError(
                f"embed_dims[{i}]={embed_dims[i]} is not divisible by num_heads={num_heads}; "
                f"pick a multiple of {num_heads}."
            )
    if depth < 2:
        raise QsdError(f"depth={depth} leaves no transformer block; use 2 or more (a multiple of 4 divides evenly).")
    if mlp_ratio * min(embed_dims[0] // 2, *embed_dims) < 1:
        raise QsdError(f"mlp_ratio={mlp_ratio} leaves no channels inside the MLPs.")
    if num_classes < 0:
        raise QsdError(f"num_classes={num_classes} is negative; 0 removes the classifier.")
    if len(strides) != 5 or min(strides) < 1:
        raise QsdError(f"strides={tuple(strides)}: five positive strides are needed, one per down-sampling.")
    if not 0 <= drop_path_rate < 1:
        raise QsdError(f"drop_path_rate={drop_path_rate} is not in [0, 1).")
    if global_pool != "avg":
        raise QsdError(f"global_pool={global_pool!r}: only 'avg' exists.")
