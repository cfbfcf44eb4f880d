"""Why a count of an integer network differs: its membrane is nearer to a threshold than the rounding of its sums."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd.integer.description import Description, Neuron
from qsd.integer.signals import Floats

Array = NDArray[Any]


@dataclass(frozen=True)
class Margin:
    """Real sizes of a neuron's membrane, in thresholds, by channel or one for all.

    Attributes:
        unit: Value of one unit.
        bound: Largest distance from the membrane of the network of floats, for equal spikes before.
    """

    unit: Floats
    bound: Floats


@dataclass(frozen=True)
class ChangedCount:
    """The first neuron of an image whose counts differ from those of the network of floats.

    The membranes of both networks lie on different sides of a threshold. So this network's membrane is no farther from
    the threshold than the bound of their distance.

    Attributes:
        image: Number of the image.
        neuron: Name of the neurons.
        counts: Number of counts that differ there.
        distance: Distance of a membrane from the threshold, in thresholds, of the one that is nearest to its bound.
        bound: The bound in the channel of this membrane, in thresholds.
    """

    image: int
    neuron: str
    counts: int
    distance: float
    bound: float


def changed_counts(
    network: Description,
    arrays: Mapping[str, Array],
    margins: Mapping[str, Margin],
    signals: Mapping[str, Array],
    expected: Mapping[str, Array],
) -> list[ChangedCount]:
    """The first changed counts of all images that have one.

    Args:
        network: The description.
        arrays: Its arrays.
        margins: Real sizes of the membranes, by neuron.
        signals: Signals of the integer network in counts, ``[B, ...]``.
        expected: Counts of the network of floats, by neuron.
    """
    found: dict[int, ChangedCount] = {}
    for layer in network.layers:
        if not isinstance(layer, Neuron):
            continue
        theirs = expected[layer.name].astype(np.int64)
        wrong = signals[layer.name] != theirs
        for image in np.flatnonzero(wrong.reshape(len(wrong), -1).any(1)).tolist():
            if image not in found:
                places = tuple(np.argwhere(wrong[image]).T)
                membranes = signals[layer.inputs[0]][image][places]
                counts = signals[layer.name][image][places], theirs[image][places]
                margin = margins[layer.name]
                found[image] = _changed_count(image, layer, arrays, margin, places[0], membranes, counts)
    return [found[image] for image in sorted(found)]


def _changed_count(
    image: int,
    layer: Neuron,
    arrays: Mapping[str, Array],
    margin: Margin,
    channels: Array,
    membranes: Array,
    counts: tuple[Array, Array],
) -> ChangedCount:
    """The distances of membranes from the thresholds that both networks see from different sides."""
    thresholds = _of_channels(arrays[f"{layer.name}/thresholds"].astype(np.int64), channels)
    if layer.directed:
        membranes = membranes * arrays[f"{layer.name}/direction"][channels]
    mine, theirs = counts
    more = theirs > mine
    # Of the thresholds between both counts the farthest one.
    threshold = thresholds[np.arange(len(channels)), np.where(more, theirs - 1, theirs)]
    # The real threshold lies above the largest sum that does not reach it, and at or below the least one that does.
    distances = np.where(more, threshold - 1 - membranes, membranes - threshold) * _of_channels(margin.unit, channels)
    bounds = _of_channels(margin.bound, channels)
    worst = int(np.argmax(distances - bounds))
    return ChangedCount(image, layer.name, len(channels), float(distances[worst]), float(bounds[worst]))


def _of_channels(values: Array, channels: Array) -> Array:
    """The entries of channels in an array with one entry for each channel, or for all."""
    return values[channels] if len(values) > 1 else values[np.zeros_like(channels)]
