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


class FrameRecord(Schema):
    """The events of one frame of a recording.

    Attributes:
        brighter: Events where it became brighter, as shares of the largest count of all frames.
        darker: Events where it became darker, likewise; empty for frames of one channel.
        events: Number of events.
    """

    brighter: Map
    darker: Map
    events: Annotated[float, Field(ge=0)]


class ActivityRecord(Schema):
    """Firing rates, attention and spikes over time; see `qsd.spiking.activity.Activity`.

    Attributes:
        image: The image in grey, from 0 to 1; of a recording the events of all frames.
        frames: Events of a recording by frame; ``None`` for an image.
    """

    image: Map
    frames: list["FrameRecord"] | None = None
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
        image: The image as the network takes it, ``[C, H, W]``, or a recording ``[F, C, H, W]``.
        matrices: Whether to keep the matrices of attention, which are large.
    """
    frames = image if image.dim() == 4 else None
    grey = (image if frames is None else frames.mean(0)).double().mean(0).cpu()
    span = float(grey.max() - grey.min())
    grey = (grey - grey.min()) / span if span > 0 else torch.zeros_like(grey)
    return ActivityRecord(
        image=_rounded(_small(grey)),
        frames=None if frames is None else _frame_records(frames.double().cpu()),
        rates={name: _rounded(x) for name, x in activity.rates.items()},
        responses={name: _rounded(x) for name, x in activity.responses.items()},
        received={name: _rounded(x) for name, x in activity.received.items()},
        matrices={name: _rounded(x) for name, x in activity.matrices.items()} if matrices else {},
        over_time=activity.over_time,
        latency=activity.latency,
    )


def _frame_records(frames: Tensor) -> list[FrameRecord]:
    """Frames ``[F, C, H, W]``: darker events in channel 0 and brighter ones in channel 1, or one channel of both."""
    most = max(float(frames.max()), 1.0)
    return [
        FrameRecord(
            brighter=_rounded(_small(frame[-1] / most)),
            darker=_rounded(_small(frame[0] / most)) if len(frame) > 1 else [],
            events=float(frame.clamp(min=0).sum()),
        )
        for frame in frames
    ]


def _small(x: Tensor) -> Tensor:
    scale = _LONGEST_SIDE / max(x.shape)
    if scale >= 1:
        return x
    size = [max(1, round(side * scale)) for side in x.shape]
    return F.interpolate(x[None, None], size, mode="area")[0, 0]


def _rounded(x: Tensor) -> Map:
    return [[min(1.0, max(0.0, round(value, _DIGITS))) for value in row] for row in x.tolist()]
