"""The part of a detector or segmenter that sees the whole image, for pictures of where it fires."""

from pathlib import Path
from typing import Any

from torch import Tensor

from qsd.mm.drawing import read_image
from qsd.mm.loading import load_model
from qsd.mm.spiking.model import Batch, ConvertedModel, convert_model, predict
from qsd.mm.spiking.segments import DENSE
from qsd.spiking import SpikingNetwork


def dense_segment(checkpoint: str | Path, image: str | Path, device: str) -> tuple[SpikingNetwork, Tensor, str]:
    """Backbone, neck and dense head of a trained model, and the image as it reaches them.

    Args:
        checkpoint: The checkpoint of a training, as `qsd.mm.loading.load_model` reads it.
        image: The image file.
        device: The device to compute on.

    Returns:
        The spiking network, its input ``[1, C, H, W]``, and the name of the model.

    Raises:
        QsdError: If one of the files cannot be read, or the model cannot be converted.
    """
    model, config = load_model(checkpoint, device)
    _, batch = read_image(config, image)
    converted = convert_model(model)
    return converted.segments[DENSE], dense_input(converted, batch), type(model).__name__


def dense_input(converted: ConvertedModel, batch: Batch) -> Tensor:
    """The images of a batch as they reach the dense segment, ``[B, C, H, W]``.

    Args:
        converted: The converted model.
        batch: A batch of a data loader.
    """
    inputs: dict[str, Tensor] = {}

    def run(name: str, x: Tensor) -> Any:
        inputs.setdefault(name, x)
        return converted.segments[name].evaluate(x)

    with converted.running(run):
        predict(converted.model, batch)
    return inputs[DENSE]
