"""Names and sizes in checkpoints of E-SpikeFormer's published code (github.com/BICLab/Spike-Driven-Transformer-V3)."""

import logging
from typing import Any

from torch import Tensor

from qsd.layers.renamed import rename_parameters
from qsd.models.published import PublishedCode, Renaming, StateDict, renamed, stage_sizes, with_two_sides
from qsd.models.reference import STAGE_NAMES

logger = logging.getLogger(__name__)

# Names of the base network, after those of stages, applied in this order. A container holds a convolution as "0" and
# its norm as "1".
_BASE_NAMES: tuple[Renaming, ...] = (
    *STAGE_NAMES,
    (r"\.(Conv|conv)\.pwconv1\.", ".sep_conv.expand."),
    (r"\.(Conv|conv)\.dwconv\.", ".sep_conv.depthwise."),
    (r"\.(Conv|conv)\.pwconv2\.", ".sep_conv.reduce."),
    (r"(blocks\.\d+)\.conv([12])\.", r"\1.mlp.fc\2.conv."),
    (r"(blocks\.\d+)\.bn([12])\.", r"\1.mlp.fc\2.norm."),
    (r"\.attn\.([qkv])_conv\.", r".attn.\1_proj."),
    (r"\.attn\.proj_conv\.", ".attn.proj."),
    (r"(sep_conv\.\w+|attn\.\w+)\.0\.", r"\1.conv."),
    (r"(sep_conv\.\w+|attn\.\w+)\.1\.", r"\1.norm."),
)
# The same of the large network.
_LARGE_NAMES: tuple[Renaming, ...] = (
    *STAGE_NAMES,
    (r"(blocks\.\d+)\.conv([12])\.0\.0\.", r"\1.mlp.fc\2.conv."),
    (r"(blocks\.\d+)\.conv([12])\.0\.1\.", r"\1.mlp.fc\2.norm."),
    (r"\.attn\.([qkv])_conv\.", r".attn.\1_proj."),
    (r"\.attn\.proj_conv\.", ".attn.proj."),
    (r"(attn\.\w+)\.0\.conv([12])\.0\.", r"\1.pointwise\2."),
    (r"(attn\.\w+)\.0\.conv([12])\.1\.", r"\1.norm\2."),
    (r"(attn\.\w+)\.1\.", r"\1.norm3."),
)
_LARGE_STAGES = ("downsample1_1", "downsample1_2", "downsample2", "downsample3")
_BASE_STAGES = (*_LARGE_STAGES, "downsample4")
# Layers of the large network that the published code builds and never runs: their norms do not even fit.
_DEAD = ".rep_conv."


def convert_base(state: StateDict) -> dict[str, Tensor]:
    """Give a state dict of the published base network the names of qsd, and reshape its 1-D convolutions.

    Args:
        state: State dict of the published code, without wrappings.
    """
    return _converted(state, _BASE_NAMES)


def convert_large(state: StateDict) -> dict[str, Tensor]:
    """Give a state dict of the published large network the names of qsd, without the layers that never ran.

    Args:
        state: State dict of the published code, without wrappings.
    """
    live = {name: tensor for name, tensor in state.items() if _DEAD not in name}
    if len(live) < len(state):
        logger.warning(
            "%d tensors of 'rep_conv' are left out: the published network has these layers and never runs them.",
            len(state) - len(live),
        )
    return _converted(live, _LARGE_NAMES)


def _converted(state: StateDict, names: tuple[Renaming, ...]) -> dict[str, Tensor]:
    converted = {}
    for name, tensor in state.items():
        name = renamed(name, names)
        converted[name] = with_two_sides(name, tensor)
    rename_parameters(converted)
    return converted


def base_sizes(state: StateDict) -> dict[str, Any]:
    """The arguments of `ESpikeFormer` that follow from a state dict of the published base network.

    Args:
        state: State dict of the published code, without wrappings.

    Returns:
        All sizes but the number of attention heads.

    Raises:
        QsdError: If tensors are missing.
    """
    return stage_sizes(state, _BASE_STAGES) | _ratios(state, "block3.0.attn.v_conv.0.weight")


def large_sizes(state: StateDict) -> dict[str, Any]:
    """The arguments of `ESpikeFormerLarge` that follow from a state dict of the published large network.

    Args:
        state: State dict of the published code, without wrappings.

    Returns:
        All sizes but the number of attention heads, and whether there is a second head.

    Raises:
        QsdError: If tensors are missing.
    """
    ratios = _ratios(state, "block3.0.attn.v_conv.0.conv2.0.weight")
    return stage_sizes(state, _LARGE_STAGES) | ratios | {"distilled": "head_kd.weight" in state}


def _ratios(state: StateDict, value: str) -> dict[str, Any]:
    """Channels of MLPs and values over those of a block, as far as the first block is there."""
    found: dict[str, Any] = {}
    hidden = state.get("block3.0.mlp.fc1_conv.weight")
    if hidden is not None:
        found["mlp_ratio"] = hidden.shape[0] / hidden.shape[1]
    if value in state and hidden is not None:
        found["value_ratio"] = state[value].shape[0] // hidden.shape[1]
    return found


BASE_CODE = PublishedCode(
    "E-SpikeFormer",
    lambda state: "ConvBlock1_1.0.Conv.dwconv.0.weight" in state,
    convert_base,
    base_sizes,
    "e_spikeformer_5m",
    {"weight_bits": 0, "rounding": "half_even"},
)
LARGE_CODE = PublishedCode(
    "E-SpikeFormer (large)",
    lambda state: "ConvBlock1_1.0.conv1.0.0.weight" in state,
    convert_large,
    large_sizes,
    "e_spikeformer_83m",
    {"weight_bits": 0},
)
