"""Where and when a network fires for one image, as plain data."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from qsd.schema import Schema, Share, Size
from qsd.spiking.activity import Activity

_LONGEST_SIDE = 128  # pixels of the image behind the maps
_DIGITS = 4
Map = list[list[Share]]


class ActivityRecord(Schema):
    """Firing rates, attention and spikes over time; see `qsd.spiking.activity.Activity`.

    Attributes:
        image: The image in grey, from 0 to 1.
    """

    image: Map
    rates: dict[str, Map]
    responses: dict[str, Map]
    received: dict[str, Map]
    matrices: dict[str, Map] = Field(default_factory=dict)
    over_time: dict[str, list[Annotated[float, Field(ge=0)]]]
    latency: Size


def activity_record(activity: Activity, image: Tensor, matrices: bool = False) -> ActivityRecord:
    """The numbers of the pictures, rounded to what a picture shows.

    Args:
        activity: Spikes for the image.
        image: The image as the network takes it, ``[C, H, W]``.
        matrices: Whether to keep the matrices of attention, which are large.
    """
    grey = image.double().mean(0).cpu()
    span = float(grey.max() - grey.min())
    grey = (grey - grey.min()) / span if span > 0 else torch.zeros_like(grey)
    scale = _LONGEST_SIDE / max(grey.shape)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in grey.shape]
        grey = F.interpolate(grey[None, None], size, mode="area")[0, 0]
    return ActivityRecord(
        image=_rounded(grey),
        rates={name: _rounded(x) for name, x in activity.rates.items()},
        responses={name: _rounded(x) for name, x in activity.responses.items()},
        received={name: _rounded(x) for name, x in activity.received.items()},
        matrices={name: _rounded(x) for name, x in activity.matrices.items()} if matrices else {},
        over_time=activity.over_time,
        latency=activity.latency,
    )


def _rounded(x: Tensor) -> Map:
    return [[min(1.0, max(0.0, round(value, _DIGITS))) for value in row] for row in x.tolist()]
