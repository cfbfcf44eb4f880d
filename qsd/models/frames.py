"""Arguments that turn any registered classifier of images into one of recordings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.models._features import FeatureGetterNet
from torch import nn

from qsd.errors import QsdError
from qsd.layers.frames import EventCounts, FrameAxis, FrameMean, FrameMode, keep_membranes
from qsd.models.base import ImageClassifier

FRAME_ARGUMENTS = ("frames", "over_frames", "decay", "events")


@dataclass(frozen=True)
class FrameOptions:
    """Further arguments of every registered model.

    Attributes:
        frames: Number F of frames of a recording ``[B, F, C, H, W]``; ``None`` for a network of images.
        over_frames: What becomes of the frames, see `qsd.layers.frames.FrameAxis`.
        decay: Share of a neuron's remainder, 0 to 1, that it hands on to the next frame; of effect with
            ``over_frames="membrane"`` only.
        events: Whether the input are event counts, which become spikes, see `qsd.layers.frames.EventCounts`.
    """

    frames: int | None = None
    over_frames: FrameMode = "average"
    decay: float = 0.5
    events: bool = False

    @classmethod
    def taken_from(cls, arguments: Mapping[str, Any]) -> tuple["FrameOptions", dict[str, Any]]:
        """Split the arguments of a model.

        Args:
            arguments: All arguments.

        Returns:
            The options, and the arguments of the network of images.

        Raises:
            QsdError: If the frames are to be combined and their number is missing.
        """
        options = cls(**{name: arguments[name] for name in FRAME_ARGUMENTS if name in arguments})
        if options.frames is None and options.over_frames != "average":
            raise QsdError(f"over_frames={options.over_frames!r} needs the number of frames; give frames=...")
        return options, {name: value for name, value in arguments.items() if name not in FRAME_ARGUMENTS}

    def channels(self, in_chans: int) -> int:
        """Channels of the images that the network's first layer sees.

        Args:
            in_chans: Channels of a frame.
        """
        return in_chans * self.frames if self.frames is not None and self.over_frames == "channels" else in_chans

    def apply(self, model: nn.Module) -> None:
        """Give a network of images its frame axis, the memory of its neurons, and the spikes of its input.

        Args:
            model: Fresh `ImageClassifier`, perhaps within timm's network of features.

        Raises:
            QsdError: If an option is out of range.
        """
        network: Any = model.model if isinstance(model, FeatureGetterNet) else model
        if not isinstance(network, ImageClassifier):
            raise QsdError(f"{type(network).__name__} takes no frames; use a model of qsd.")
        if self.frames is not None:
            network.frame_axis = FrameAxis(self.frames, self.over_frames)
            if self.over_frames != "channels":
                network.frame_mean = FrameMean(self.frames)
            if self.over_frames == "membrane":
                keep_membranes(network, self.frames, self.decay)
        if self.events and network.time_steps is not None:
            network.event_counts = EventCounts(network.time_steps)
