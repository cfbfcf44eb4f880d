"""The registered models, as one table. Importing this module makes their names known to timm.

A family is one entry of `FAMILIES`. `register_family` registers one that is defined elsewhere in the same way.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from qsd.errors import QsdError
from qsd.models.base import ImageClassifier
from qsd.models.csdformer import CsdFormer
from qsd.models.e_spikeformer import ESpikeFormer, ESpikeFormerLarge
from qsd.models.e_spikeformer_names import BASE_CODE, LARGE_CODE
from qsd.models.frames import FrameOptions
from qsd.models.published import PublishedCode, StateDict
from qsd.models.qsd_transformer import QsdTransformer
from qsd.models.reference import QSD_CODE
from qsd.models.shipped import tags_of

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A family of models: one class, its sizes, and a float twin of each.

    Attributes:
        cls: Class of the models.
        title: Name of the family in prose.
        sizes: Arguments of each variant, by its name.
        twin: Arguments that make a float twin of a variant, whatever else is asked for; its name ends with ``_ann``.
        cfg: Gives timm's configuration for the arguments of a variant.
        hint: The answer to ``pretrained=True``: where weights can be found.
        out_indices: Modules whose features ``features_only=True`` returns: by number, or how many of the last.
        published: The published code whose checkpoints the family reads, if there is one.
    """

    cls: type[ImageClassifier]
    title: str
    sizes: Mapping[str, Arguments]
    twin: Arguments
    cfg: Callable[[Arguments], dict[str, Any]]
    hint: str
    out_indices: int | tuple[int, ...]
    published: PublishedCode | None = None


QSD_VARIANTS: dict[str, Arguments] = {
    # Sizes of the published code; the names count float parameters at 1000 classes.
    "qsd_8m": {"embed_dims": (48, 96, 192, 256)},
    "qsd_15m": {"embed_dims": (64, 128, 256, 360)},
    "qsd_31m": {"embed_dims": (96, 192, 384, 480)},
    "qsd_55m": {"embed_dims": (128, 256, 512, 640)},
    "qsd_75m": {"embed_dims": (128, 256, 512, 640), "depth": 12},
    "qsd_124m": {"embed_dims": (192, 384, 768, 960)},
    # Ours, for demonstrations and tests. A large layer scale lets a short training reach the attention.
    "qsd_tiny": {"embed_dims": (16, 32, 64, 80), "depth": 4, "layer_scale": 0.1},
}

CSD_VARIANTS: dict[str, Arguments] = {
    # The paper's names: blocks, then channels. ImageNet's tokenizer pools four times, CIFAR's twice.
    "csdformer_8_384": {"embed_dims": 384, "depth": 8},
    "csdformer_8_512": {"embed_dims": 512, "depth": 8},
    "csdformer_8_768": {"embed_dims": 768, "depth": 8},
    "csdformer_4_256": {"embed_dims": 256, "depth": 4, "strides": (1, 1, 2, 2)},
    "csdformer_2_384": {"embed_dims": 384, "depth": 2, "num_heads": 12, "strides": (1, 1, 2, 2)},
    "csdformer_4_384": {"embed_dims": 384, "depth": 4, "num_heads": 12, "strides": (1, 1, 2, 2)},
}

# Sizes of the published code; the names count float parameters at 1000 classes.
ESF_VARIANTS: dict[str, Arguments] = {
    "e_spikeformer_tiny": {"embed_dims": (24, 48, 96, 128)},
    "e_spikeformer_5m": {"embed_dims": (32, 64, 128, 192)},
    "e_spikeformer_10m": {"embed_dims": (48, 96, 192, 240)},
    "e_spikeformer_19m": {"embed_dims": (64, 128, 256, 360)},
}

# The published names of the large network count dead layers (83 M); those here keep them nevertheless.
ESF_LARGE_VARIANTS: dict[str, Arguments] = {
    "e_spikeformer_83m": {"embed_dims": (128, 256, 512)},
    "e_spikeformer_171m": {"embed_dims": (196, 384, 768)},
}

# Arguments of timm that concern weights, and are not stored with a model.
_NOT_STORED = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir")

_QSD_HINT = (
    "no pretrained weights are distributed under this name; checkpoints of the published code are linked from the "
    "README of github.com/bollossom/QSD-Transformer: load one with qsd.load_reference_weights(model, path)."
)
_CSD_HINT = (
    "no pretrained weights are distributed under this name, and none were published for CSDformer; train it with "
    "configs/csdformer_imagenet.yaml or another of its configurations."
)

_IMAGENET = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (14, 14),
    "crop_pct": 224 / 256,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "classifier": "head",
}
_QSD_CFG = {
    **_IMAGENET,
    "first_conv": "stem.downsample.proj.conv",
    "paper_ids": "arXiv:2501.13492",
    "paper_name": "Quantized Spike-driven Transformer",
    "origin_url": "https://github.com/bollossom/QSD-Transformer",
    "license": "mit",
}
_CSD_CFG = {
    **_IMAGENET,
    "crop_pct": 1.0,
    "first_conv": "stem.0.conv",
    "paper_ids": "arXiv:2509.17461",
    "paper_name": "CSDformer: A Conversion Method for Fully Spike-Driven Transformer",
}
_ESF_HINT = (
    "no pretrained weights are distributed under this name; checkpoints of the published code are linked from the "
    "README of github.com/BICLab/Spike-Driven-Transformer-V3: load one with qsd.load_reference_weights(model, path)."
)
_ESF_CFG = {
    **_IMAGENET,
    "crop_pct": 224 / 232,
    "first_conv": "stem.downsample.proj.conv",
    "paper_ids": "arXiv:2411.16061",
    "paper_name": "Scaling Spike-driven Transformer with Efficient Spike Firing Approximation Training",
    "origin_url": "https://github.com/BICLab/Spike-Driven-Transformer-V3",
}
_CIFAR = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}

FAMILIES = [
    Family(
        QsdTransformer,
        "QSD-Transformer",
        QSD_VARIANTS,
        {"time_steps": None, "weight_bits": None},
        lambda _arguments: _QSD_CFG,
        _QSD_HINT,
        (0, 1, 2, 3),
        QSD_CODE,
    ),
    Family(
        CsdFormer,
        "CSDformer",
        CSD_VARIANTS,
        {"activation": "relu", "weight_bits": None},
        lambda arguments: {**_CSD_CFG, **_CIFAR} if "strides" in arguments else _CSD_CFG,
        _CSD_HINT,
        1,
    ),
    Family(
        ESpikeFormer,
        "E-SpikeFormer",
        ESF_VARIANTS,
        {"time_steps": None, "weight_bits": None},
        lambda _arguments: _ESF_CFG,
        _ESF_HINT,
        (0, 1, 2, 3),
        BASE_CODE,
    ),
    Family(
        ESpikeFormerLarge,
        "E-SpikeFormer (large)",
        ESF_LARGE_VARIANTS,
        {"time_steps": None, "weight_bits": None},
        lambda _arguments: {**_ESF_CFG, "classifier": ("head", "head_kd")},
        _ESF_HINT,
        (0, 1, 2),
        LARGE_CODE,
    ),
]

default_cfgs: dict[str, Any] = {}


def register_family(family: Family) -> None:
    """Make the variants of a family and their float twins known to timm.

    Args:
        family: The family.
    """
    if family not in FAMILIES:
        FAMILIES.append(family)
    for variant, sizes in family.sizes.items():
        cfg = family.cfg(sizes)
        tagged = {weights.name: {**cfg, **weights.cfg()} for weights in tags_of(variant).values()}
        # The star keeps the configuration without weights the default, in front of those with a tag.
        default_cfgs.update(generate_default_cfgs({**tagged, f"{variant}.*": cfg, f"{variant}_ann": cfg}))
        _register(family, variant, sizes, f"{family.title} {dict(sizes)}.")
        _register(family, f"{variant}_ann", sizes, f"Float twin of {variant}: ReLU neurons and float weights.")


def family_of(name: str) -> Family:
    """The family of a registered model.

    Args:
        name: Name of a variant or of a float twin.

    Raises:
        QsdError: If no family has it.
    """
    variant = name.removesuffix("_ann")
    found = next((family for family in FAMILIES if variant in family.sizes), None)
    if found is None:
        raise QsdError(f"model {name!r} belongs to no family; register one with qsd.models.variants.register_family.")
    return found


def family_of_code(state: StateDict) -> Family | None:
    """The family whose published code a state dict comes from, or ``None``.

    Args:
        state: State dict without wrappings.
    """
    return next((f for f in FAMILIES if f.published is not None and f.published.matches(state)), None)


def _register(family: Family, name: str, arguments: Arguments, description: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> Any:
        tag = kwargs.get("pretrained_cfg")
        shipped = tags_of(name).get(tag) if isinstance(tag, str) else None
        if shipped is not None:  # a tag's defaults are those of its training
            kwargs = {**shipped.arguments, **kwargs}
        # The arguments of a spiking network, those of a recipe for instance, make its float twin too.
        twin = family.twin if name.endswith("_ann") else {}
        options, own = FrameOptions.taken_from({**arguments, **kwargs, **twin})
        if options.channels(1) > 1:
            own["in_chans"] = options.channels(own.get("in_chans", 3))
        model: Any = build_model_with_cfg(
            family.cls,
            name,
            False,
            feature_cfg={"out_indices": family.out_indices, "feature_cls": "getter"},
            **own,
        )
        if options != FrameOptions():
            options.apply(model)
        if pretrained:
            from qsd.models.pretrained import load_pretrained  # which reads files of all families

            hint = f"{name}: {_names_of_tags(name)}{family.hint}"
            load_pretrained(model, hint, family.cfg(arguments).get("first_conv"), kwargs.get("cache_dir"))
        # Packed files store this, so that the model can be built again by its name.
        stored = {k: v for k, v in kwargs.items() if k not in _NOT_STORED}
        channels = getattr(model, "in_chans", 3) // options.channels(1)
        if channels != arguments.get("in_chans", 3):  # perhaps by the configuration of pretrained weights
            stored["in_chans"] = channels
        model.registered = {"name": name, "arguments": stored}
        return model

    # timm takes an entry point's name, module and configuration from these attributes.
    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = description
    setattr(sys.modules[__name__], name, register_model(entrypoint))


def _names_of_tags(model: str) -> str:
    names = [weights.name for weights in tags_of(model).values()]
    return f"weights have the names {', '.join(names)}; " if names else ""


for _family in FAMILIES:
    register_family(_family)
