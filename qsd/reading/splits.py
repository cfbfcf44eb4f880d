"""Fixed parts of a data set, with every class in the same proportion."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def stratified_split(
    labels: Sequence[int] | np.ndarray[Any, Any], sizes: Sequence[int], seed: int = 0
) -> list[np.ndarray[Any, Any]]:
    """Split indices into parts with every class in the same proportion.

    The split is fixed: it depends on the arguments alone.

    Args:
        labels: The class of every image ``[N]``.
        sizes: Images per part; together at most N.
        seed: Seed of the split.

    Returns:
        The sorted indices of every part, disjoint. The number of images of a class in a part differs from its exact
        share by less than two.
    """
    labels = np.asarray(labels)
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    # In this order every contiguous piece holds all classes in proportion.
    order = np.lexsort((labels, position))
    bounds = np.cumsum(sizes)
    return [np.sort(part) for part in np.split(order, bounds)[: len(sizes)]]
