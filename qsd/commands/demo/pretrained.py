"""The demonstration without a training: the network of digits that the package ships, in binary spikes."""

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qsd import to_spike_driven
from qsd.errors import QsdError
from qsd.image_notes import ImageNotes
from qsd.models.shipped import shipped_weights
from qsd.reading.digits import SIZES, read_digits
from qsd.reading.splits import stratified_split

_NAME = "qsd_tiny.digits"
_SHADES = " .:-=+*#%@"
_SHOWN_NEURONS = 72


def show(max_images: int | None) -> int:
    """Load, classify, step, and print the spikes of one digit.

    Args:
        max_images: The number of test images to classify; ``None`` for all.

    Returns:
        The exit code.

    Raises:
        QsdError: If the package has no such weights.
    """
    weights = shipped_weights().get(_NAME)
    if weights is None:
        raise QsdError(f"the weights {_NAME} are missing; install the package again.")
    model = timm.create_model(_NAME, pretrained=True).eval()
    spiking = to_spike_driven(model).float()
    images, labels = (part[:max_images] for part in _test_digits(weights.images))
    classes = torch.cat([spiking.evaluate(batch).argmax(1) for batch in images.split(100)])
    stepped = spiking.simulate(images[:1], record="head_neuron")
    _print(images[0, 0], stepped.spikes["head_neuron"][:, 0])
    table = Table("result", "value", title=f"{_NAME}, converted to binary spikes", title_justify="left")
    table.add_row("weights", f"{weights.file.stat().st_size / 1e3:.0f} kB in the package")
    table.add_row("class of this digit, counted and stepped", f"{int(classes[0])} and {int(stepped.logits.argmax())}")
    table.add_row("time steps from image to class", str(stepped.latency))
    right = int((classes == labels).sum())
    table.add_row("test accuracy", f"{100 * right / len(labels):.2f} % ({right} of {len(labels)} digits)")
    Console().print(table)
    return 0


def _test_digits(notes: ImageNotes) -> tuple[Tensor, Tensor]:
    """Images ``[400, 1, H, W]`` and labels ``[400]`` of `qsd.data.DigitsData`, without importing Lightning."""
    height, width = notes.img_size
    images, labels = (torch.from_numpy(part) for part in read_digits(height, width))
    *_, test = stratified_split(labels.numpy(), list(SIZES.values()))
    scaled = (images[test, None] / 255 - notes.mean[0]) / notes.std[0]
    return scaled, labels[test]


def _print(image: Tensor, spikes: Tensor) -> None:
    """Print a picture ``[H, W]`` and the spikes ``[T, ...]`` of some neurons."""
    low, high = float(image.min()), float(image.max())
    for row in image[::2]:  # a letter is twice as high as wide
        print("".join(_SHADES[round((float(value) - low) / (high - low) * (len(_SHADES) - 1))] for value in row))
    print(f"\nspikes of {_SHOWN_NEURONS} neurons in front of the classifier, one line for each time step:")
    for step in spikes.flatten(1)[:, :_SHOWN_NEURONS]:
        print("".join("|" if spike else "." for spike in step.tolist()))
    print()
