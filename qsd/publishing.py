"""Folders of weights as timm and the Hugging Face hub lay them out, with a model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qsd._version import __version__
from qsd.errors import QsdError
from qsd.files import replacing_together
from qsd.image_notes import ImageNotes, read_image_notes
from qsd.layers.wrappers import unwrapped
from qsd.models.compact import CompactModel
from qsd.packing import ModelSize, model_size, save_packed

_WEIGHTS, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
# Where weights come from is no property of the weights in a folder.
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "tag", "custom_load", "label_offset")
_CARD_TEXT = """---
license: {licence}
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- spiking-neural-network
- quantized
---

# {title}

A spike-driven network of [qsd](https://pypi.org/project/qsd/) {version}: `{architecture}`, {weights}.

{facts}

## Use

```python
import timm
import qsd  # registers the models with timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
spiking = qsd.to_spike_driven(model)  # binary spikes; compares all spike counts before it returns
```

Other numbers of classes and channels are arguments, `num_classes=5, in_chans=3`.
{images}
"""


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    notes: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    data: str | None = None,
    licence: str = "mit",
    record: Any = None,
) -> None:
    """Write the weights of a trained network as a folder that timm and the Hugging Face hub read.

    The folder holds ``model.safetensors`` (packed: weights at their real number of bits), ``config.json`` and
    ``README.md``, the model card. ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads it. It can be
    uploaded as it is; ``timm.models.push_to_hf_hub`` uploads a network that was loaded from it.

    Args:
        model: A trained network that is registered with timm.
        folder: The folder to write; files of these names in it are replaced.
        notes: Facts about its images, as `qsd.packing.image_notes` gives them for a data module.
        metrics: Figures for the card by name, such as ``{"test accuracy": 0.94}``.
        data: The data set that it was trained on, in words.
        licence: The licence of the weights, by its name on the hub.
        record: The record of its conversion, a `qsd.report.Record`, whose figures the card states.

    Raises:
        QsdError: If the network is not registered with timm, was changed after it was built, or the folder cannot be
            written.
    """
    inner = unwrapped(model)
    registered = CompactModel.of(inner).registered
    if registered is None:
        raise QsdError("the network cannot be built again by its name; register it with timm and build it by its name.")
    facts = None if notes is None else read_image_notes(json.loads(json.dumps(notes)), "the notes")
    config = _config(inner, registered, facts)
    card = _card(inner, registered["name"], facts, metrics or {}, data, licence, record)
    with replacing_together(folder) as partial:
        save_packed(inner, partial / _WEIGHTS, dict(notes or {}))
        (partial / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / _CARD).write_text(card, encoding="utf-8")


def _config(model: Any, registered: Mapping[str, Any], facts: ImageNotes | None) -> dict[str, Any]:
    """The content of ``config.json`` as timm reads it."""
    cfg = {
        key: value for key, value in dict(getattr(model, "pretrained_cfg", None) or {}).items() if key not in _SOURCES
    }
    arguments = {key: value for key, value in registered["arguments"].items() if key != "num_classes"}
    cfg["num_classes"] = model.num_classes
    if facts is not None:
        cfg.update(
            input_size=[model.in_chans, *facts.img_size],
            pool_size=None,
            mean=facts.mean,
            std=facts.std,
            crop_pct=facts.crop_pct,
            interpolation=facts.interpolation,
            label_names=facts.class_names,
        )
    config = {
        "architecture": registered["name"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": {key: value for key, value in cfg.items() if value is not None or key == "pool_size"},
    }
    if facts is not None and facts.class_names is not None:
        config["label_names"] = facts.class_names
    return config


def _card(
    model: Any,
    name: str,
    facts: ImageNotes | None,
    metrics: Mapping[str, float],
    data: str | None,
    licence: str,
    record: Any,
) -> str:
    """The text of the model card."""
    return _CARD_TEXT.format(
        licence=licence,
        title=f"{name} on {data}" if data else name,
        version=__version__,
        architecture=name,
        weights=_weights(model),
        facts="\n".join(_facts(model_size(model), metrics, data, record)),
        images=_images(facts),
    )


def _weights(model: Any) -> str:
    bits = "float weights" if model.weight_bits is None else f"{model.weight_bits}-bit weights"
    return bits if model.time_steps is None else f"{bits}, T = {model.time_steps} time steps"


def _facts(size: ModelSize, metrics: Mapping[str, float], data: str | None, record: Any) -> list[str]:
    """Rows of the card's table."""
    rows = [("parameters", f"{size.parameters:,}"), ("packed weights", f"{size.packed_bytes / 1e3:.0f} kB")]
    rows += [("trained on", data)] if data else []
    rows += [(name, f"{100 * value:.2f} %") for name, value in metrics.items()]
    if record is not None:
        if record.accuracy.kind == "classifier":
            images = f"{record.accuracy.images} images ({record.data.description})"
            rows.append(("accuracy in binary spikes", f"{100 * record.accuracy.spiking:.2f} % of {images}"))
        if record.energy is not None:
            total = record.energy.total_mj
            rows.append(("energy per image, merged", f"{1e3 * total.merged:.3g} µJ"))
            rows.append(("energy per image, not merged", f"{1e3 * total.unmerged:.3g} µJ"))
        rows.append(("latency", f"{record.latency.steps} time steps"))
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def _images(facts: ImageNotes | None) -> str:
    if facts is None:
        return ""
    height, width = facts.img_size
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (facts.mean, facts.std))
    channels = "grey" if len(facts.mean) == 1 else f"{len(facts.mean)} channels"
    return f"\nImages: {height} x {width} pixels, {channels}, mean {mean}, standard deviation {std} of full scale."
