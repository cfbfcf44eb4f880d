"""Names and sizes in checkpoints of the published QSD-Transformer code (github.com/bollossom/QSD-Transformer)."""

import re
from typing import Any

from torch import Tensor

from qsd.layers.renamed import rename_parameters
from qsd.models.published import PublishedCode, Renaming, StateDict, renamed, stage_sizes, with_two_sides

# Names of stages, blocks and MLPs in the published classification code and their replacements, which the code of
# E-SpikeFormer, by the same authors, shares.
STAGE_NAMES: tuple[Renaming, ...] = (
    (r"^downsample1_1\.", "stem.downsample."),
    (r"^downsample1_2\.", "stages.0.downsample."),
    (r"^downsample([234])\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
    (r"^ConvBlock1_1\.(\d+)\.", r"stem.blocks.\1."),
    (r"^ConvBlock1_2\.(\d+)\.", r"stages.0.blocks.\1."),
    (r"^ConvBlock2_([12])\.0\.", lambda m: f"stages.1.blocks.{int(m[1]) - 1}."),
    (r"^block([34])\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"\.encode_conv\.", ".proj.conv."),
    (r"\.encode_bn\.", ".proj.norm."),
    (r"\.mlp\.fc([12])_conv\.", r".mlp.fc\1.conv."),
    (r"\.mlp\.fc([12])_bn\.", r".mlp.fc\1.norm."),
)
# All names in that of QSD-Transformer, applied in this order.
_REFERENCE_NAMES: tuple[Renaming, ...] = (
    *STAGE_NAMES,
    (r"\.Conv\.pwconv1\.", ".sep_conv.expand.conv."),
    (r"\.Conv\.bn1\.", ".sep_conv.expand.norm."),
    (r"\.Conv\.dwconv\.", ".sep_conv.reduce.depthwise."),
    (r"\.Conv\.pwconv2\.", ".sep_conv.reduce.pointwise."),
    (r"\.Conv\.bn2\.", ".sep_conv.reduce.norm."),
    (r"(blocks\.\d+)\.conv([12])\.", r"\1.mlp.fc\2.conv."),
    (r"(blocks\.\d+)\.bn([12])\.", r"\1.mlp.fc\2.norm."),
    (r"\.attn\.([qkv])_conv\.", r".attn.\1_proj."),
    (r"\.attn\.proj_conv\.", ".attn.proj."),
    (r"proj\.0\.body\.0\.", "proj.pointwise1."),
    (r"proj\.0\.body\.1\.bn\.", "proj.norm_pad.norm."),
    (r"proj\.0\.body\.2\.0\.", "proj.depthwise."),
    (r"proj\.0\.body\.2\.1\.", "proj.pointwise2."),
    (r"proj\.0\.body\.2\.2\.", "proj.norm1."),
    (r"proj\.1\.", "proj.norm2."),
    (r"\.alpha$", ".quantizer.step"),
)
# The activation quantizers of the published code return their input; their tensors have no effect.
_DEAD_TENSORS = re.compile(r"\.act\.(alpha|zero_point|init_state|signed)$")
# E-SpikeFormer's code holds each convolution of the first block in a container, together with its norm.
_OTHER_CODE = re.compile(r"ConvBlock1_1\.0\.(Conv\.dwconv|conv1)\.0\.")
_REFERENCE_STAGES = ("downsample1_1", "downsample1_2", "downsample2", "downsample3", "downsample4")


def is_reference(state: StateDict) -> bool:
    """Whether a state dict has the names of the published code.

    Args:
        state: State dict without wrappings.
    """
    return any(n.startswith("downsample1_1.") for n in state) and not any(_OTHER_CODE.match(n) for n in state)


def reference_sizes(state: StateDict) -> dict[str, Any]:
    """The arguments of `QsdTransformer` that follow from a state dict of the published code.

    Args:
        state: State dict of the published code, without wrappings.

    Returns:
        ``embed_dims``, ``depth``, ``in_chans`` and ``num_classes``. The number of heads does not follow from tensors.

    Raises:
        QsdError: If tensors are missing.
    """
    return stage_sizes(state, _REFERENCE_STAGES)


def convert_reference(state: StateDict) -> dict[str, Tensor]:
    """Give a state dict of the published code the names of qsd, and reshape its 1-D convolutions.

    Args:
        state: State dict of the published code, without wrappings.

    Returns:
        A state dict for a model of qsd, without the step sizes that were never initialised.
    """
    converted = {}
    for name, tensor in state.items():
        if _DEAD_TENSORS.search(name) or name.endswith(".init_state"):
            continue
        flag = state.get(f"{name.removesuffix('.alpha')}.init_state") if name.endswith(".alpha") else None
        if flag is not None and not bool(flag.any()):
            continue  # Uninitialised memory.
        name = renamed(name, _REFERENCE_NAMES)
        converted[name] = with_two_sides(name, tensor)
    rename_parameters(converted)
    return converted


QSD_CODE = PublishedCode(
    "QSD-Transformer", is_reference, convert_reference, reference_sizes, "qsd_15m", {"weight_bits": 4}
)
