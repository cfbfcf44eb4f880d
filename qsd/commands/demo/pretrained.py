"""The demonstration without a training: the network of digits that the package ships, in binary spikes."""

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qsd import to_spike_driven
from qsd.data import DigitsData
from qsd.errors import QsdError
from qsd.models.shipped import shipped_weights

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
    height, width = weights.images.img_size
    data = DigitsData((height, width), batch_size=100)
    batches = [(images, labels) for images, labels in data.whole_part("test") if isinstance(labels, Tensor)]
    images, labels = (torch.cat(parts)[:max_images] for parts in zip(*batches))
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


def _print(image: Tensor, spikes: Tensor) -> None:
    """Print a picture ``[H, W]`` and the spikes ``[T, ...]`` of some neurons."""
    low, high = float(image.min()), float(image.max())
    for row in image[::2]:  # a letter is twice as high as wide
        print("".join(_SHADES[round((float(value) - low) / (high - low) * (len(_SHADES) - 1))] for value in row))
    print(f"\nspikes of {_SHOWN_NEURONS} neurons in front of the classifier, one line for each time step:")
    for step in spikes.flatten(1)[:, :_SHOWN_NEURONS]:
        print("".join("|" if spike else "." for spike in step.tolist()))
    print()
