"""Weights of a loss that change during the training."""

import numpy as np

from qsd.errors import QsdError
from qsd.limits import check_number

Weight = float | list[tuple[float, float]]


def weight_points(name: str, weight: Weight) -> list[tuple[float, float]]:
    """A weight as a schedule.

    Args:
        name: Name of the weight, for messages.
        weight: A number, or points (share of the training from 0 to 1, weight).

    Raises:
        QsdError: For shares that do not ascend from 0 to 1, and for negative weights.
    """
    points = [(0.0, float(weight))] if isinstance(weight, int | float) else [(float(a), float(b)) for a, b in weight]
    shares = [share for share, _ in points]
    if not points or shares != sorted(shares) or not all(0 <= share <= 1 for share in shares):
        raise QsdError(f"{name}={weight}: a schedule's points (share, weight) need ascending shares from 0 to 1.")
    for _, value in points:
        check_number(name, value, 0)
    return points


def weight_at(progress: float, points: list[tuple[float, float]]) -> float:
    """The weight at a point of the training, by linear interpolation.

    Args:
        progress: Share of the training that is done, 0 to 1.
        points: Schedule from `weight_points`.
    """
    shares, weights = zip(*points)
    return float(np.interp(progress, shares, weights))
