"""The registered models, as data. Importing this module makes their names known to timm."""

import sys
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from qsd.errors import QsdError
from qsd.models.base import ImageClassifier
from qsd.models.csdformer import CsdFormer
from qsd.models.qsd_transformer import QsdTransformer

QSD_VARIANTS: dict[str, dict[str, Any]] = {
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

CSD_VARIANTS: dict[str, dict[str, Any]] = {
    # The paper's names: blocks, then channels. ImageNet's tokenizer pools four times, CIFAR's twice.
    "csdformer_8_384": {"embed_dims": 384, "depth": 8},
    "csdformer_8_512": {"embed_dims": 512, "depth": 8},
    "csdformer_8_768": {"embed_dims": 768, "depth": 8},
    "csdformer_4_256": {"embed_dims": 256, "depth": 4, "strides": (1, 1, 2, 2)},
    "csdformer_2_384": {"embed_dims": 384, "depth": 2, "num_heads": 12, "strides": (1, 1, 2, 2)},
    "csdformer_4_384": {"embed_dims": 384, "depth": 4, "num_heads": 12, "strides": (1, 1, 2, 2)},
}

_NOT_STORED = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # timm's, about weights

_QSD_TWIN = {"time_steps": None, "weight_bits": None}
_CSD_TWIN = {"activation": "relu", "weight_bits": None}

_QSD_HINT = (
    "no pretrained weights are distributed with qsd; checkpoints of the published code are linked from the README of "
    "github.com/bollossom/QSD-Transformer: load one with qsd.load_reference_weights(model, path)."
)
_CSD_HINT = (
    "no pretrained weights are distributed with qsd, and none were published for CSDformer; train it with "
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
_CIFAR = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}


def _csd_cfg(sizes: dict[str, Any]) -> dict[str, Any]:
    return {**_CSD_CFG, **_CIFAR} if "strides" in sizes else _CSD_CFG


default_cfgs = generate_default_cfgs(
    {
        f"{variant}{suffix}": cfg
        for suffix in ("", "_ann")
        for variant, cfg in (
            *((variant, _QSD_CFG) for variant in QSD_VARIANTS),
            *((variant, _csd_cfg(sizes)) for variant, sizes in CSD_VARIANTS.items()),
        )
    }
)


def _register(
    kind: type[ImageClassifier],
    name: str,
    arguments: dict[str, Any],
    out_indices: int | tuple[int, ...],
    hint: str,
    description: str,
) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> Any:
        if pretrained:
            raise QsdError(f"{name}: {hint}")
        model: Any = build_model_with_cfg(
            kind,
            name,
            False,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            **{**arguments, **kwargs},
        )
        # For those who store the model and want to build it again.
        model.registered = {"name": name, "arguments": {k: v for k, v in kwargs.items() if k not in _NOT_STORED}}
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = description
    setattr(sys.modules[__name__], name, register_model(entrypoint))


for _name, _sizes in QSD_VARIANTS.items():
    _stages = (0, 1, 2, 3)
    _register(QsdTransformer, _name, _sizes, _stages, _QSD_HINT, f"QSD-Transformer {_sizes}.")
    _twin = {**_sizes, **_QSD_TWIN}
    _text = f"Float twin of {_name}: float weights, ReLU neurons."
    _register(QsdTransformer, f"{_name}_ann", _twin, _stages, _QSD_HINT, _text)

for _name, _sizes in CSD_VARIANTS.items():
    _register(CsdFormer, _name, _sizes, 1, _CSD_HINT, f"CSDformer {_sizes}.")
    _twin = {**_sizes, **_CSD_TWIN}
    _text = f"Float twin of {_name}: the tailored transformer, ReLU neurons."
    _register(CsdFormer, f"{_name}_ann", _twin, 1, _CSD_HINT, _text)
