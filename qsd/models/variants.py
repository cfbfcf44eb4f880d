"""The registered models, as data. Importing this module makes their names known to timm."""

import sys
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from qsd.errors import QsdError
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

_FLOAT_TWIN = {"time_steps": None, "weight_bits": None}

_NOT_STORED = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # timm's, about weights

_PRETRAINED_HINT = (
    "no pretrained weights are distributed with qsd; checkpoints of the published code are linked from the README of "
    "github.com/bollossom/QSD-Transformer: load one with qsd.load_reference_weights(model, path)."
)

default_cfgs = generate_default_cfgs(
    {
        f"{variant}{suffix}": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (14, 14),
            "crop_pct": 224 / 256,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "stem.downsample.proj.conv",
            "classifier": "head",
            "paper_ids": "arXiv:2501.13492",
            "paper_name": "Quantized Spike-driven Transformer",
            "origin_url": "https://github.com/bollossom/QSD-Transformer",
            "license": "mit",
        }
        for variant in QSD_VARIANTS
        for suffix in ("", "_ann")
    }
)


def _register(name: str, arguments: dict[str, Any], description: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> QsdTransformer:
        if pretrained:
            raise QsdError(f"{name}: {_PRETRAINED_HINT}")
        model: Any = build_model_with_cfg(
            QsdTransformer,
            name,
            False,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
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
    _register(_name, _sizes, f"QSD-Transformer {_sizes}.")
    _register(f"{_name}_ann", {**_sizes, **_FLOAT_TWIN}, f"Float twin of {_name}: float weights, ReLU neurons.")
