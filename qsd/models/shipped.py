"""The trained weights that lie in this package, one packed file for each of timm's tags.

A file ``weights/MODEL.TAG.safetensors`` is all that a tag needs: its header holds the arguments of the model, and the
notes of its training. `tools/ship_weights.py` writes one from a run.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qsd.errors import QsdError
from qsd.image_notes import ImageNotes, read_image_notes
from qsd.models.packed_file import KEY
from qsd.models.packed_header import read_header
from qsd.reading import check_safetensors

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parents[1] / "weights"


@dataclass(frozen=True)
class ShippedWeights:
    """The weights of a tag.

    Attributes:
        file: The packed file.
        model: Name of the model.
        tag: The tag.
        arguments: Arguments that the model was trained with.
        images: Facts about its images.
        notes: All notes of the file: ``data``, ``accuracy`` (a share) of ``test_images``, ``recipe``, and others.
    """

    file: Path
    model: str
    tag: str
    arguments: Mapping[str, Any]
    images: ImageNotes
    notes: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name that timm knows it by."""
        return f"{self.model}.{self.tag}"

    def cfg(self) -> dict[str, Any]:
        """What timm's configuration of the tag says beyond that of the model."""
        names = self.images.class_names
        channels = len(self.images.mean)
        accuracy, count = self.notes.get("accuracy"), self.notes.get("test_images")
        return {
            "file": str(self.file),
            "num_classes": self.arguments["num_classes"],
            "input_size": (channels, *self.images.img_size),
            "pool_size": None,
            "mean": tuple(self.images.mean),
            "std": tuple(self.images.std),
            "crop_pct": self.images.crop_pct,
            "interpolation": self.images.interpolation,
            "label_names": None if names is None else tuple(names),
            "license": "mit",
            "notes": (f"accuracy {accuracy:.4f} on {count} test images of {self.notes.get('data')}",)
            if accuracy is not None
            else None,
        }


@cache
def shipped_weights() -> dict[str, ShippedWeights]:
    """The tags whose weights lie in this package, by their names."""
    found = {}
    for file in sorted(FOLDER.glob("*.safetensors")):
        try:
            header = read_header(check_safetensors(file)[KEY], str(file))
            facts = read_image_notes(header.notes, file)
        except (QsdError, KeyError) as error:  # a damaged file must not keep the others from their work
            logger.warning("%s is no file of weights and is passed over: %s", file, error)
            continue
        model, _, tag = file.stem.partition(".")
        if header.model is not None and header.model.name == model and tag:
            weights = ShippedWeights(file, model, tag, header.model.arguments, facts, header.notes)
            found[weights.name] = weights
    return found


def tags_of(model: str) -> dict[str, ShippedWeights]:
    """The shipped weights of a model, by their tags.

    Args:
        model: Name of the model.
    """
    return {weights.tag: weights for weights in shipped_weights().values() if weights.model == model}
