"""Frames of recordings: how a network of images sees several of them, and event counts as spikes."""

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qsd.errors import QsdError
from qsd.limits import check_number
from qsd.neurons import FloatNeuron, SpikeNeuron
from qsd.recurrence import FrameMemory

# What becomes of the frames, see `FrameAxis`.
FrameMode = Literal["average", "channels", "membrane"]
FRAME_MODES: tuple[FrameMode, ...] = get_args(FrameMode)
MAX_FRAMES = 1024


class EventCounts(SpikeNeuron):
    """Event counts as spikes: ``clip(floor(x + 1/2), 0, T)``, with one spike for each event.

    A pixel that reports more than T events in a bin passes on T of them. The converted network sends the counts as
    binary spikes into its first layer, so that this layer adds weights like any other one.

    Args:
        time_steps: T, 1 to 255.
    """

    def __init__(self, time_steps: int = 4) -> None:
        super().__init__(time_steps, 1.0, 1.0)


class FrameAxis(nn.Module):
    """Turns the frames of recordings into images, ``[B, F, C, H, W]`` to a batch of images.

    Args:
        frames: Number F of frames.
        mode: ``"average"`` and ``"membrane"``: ``[F * B, C, H, W]``, the first frames of all recordings first; every
            frame runs through the network, and the outputs are averaged. With ``"membrane"`` the neurons hand their
            remainder on to the next frame. ``"channels"``: ``[B, F * C, H, W]``, one image of many channels.

    Raises:
        QsdError: For a number that is out of range, or an unknown mode.
    """

    def __init__(self, frames: int, mode: FrameMode = "average") -> None:
        super().__init__()
        check_number("frames", frames, 1, MAX_FRAMES)
        if isinstance(frames, bool) or not isinstance(frames, int):
            raise QsdError(f"frames={frames!r} is no whole number.")
        if mode not in FRAME_MODES:
            raise QsdError(f"over_frames={mode!r} is unknown; use 'average', 'channels' or 'membrane'.")
        self.frames, self.mode = frames, mode

    @property
    def passes(self) -> int:
        """Images that a recording becomes: F, or 1 where the frames are channels."""
        return 1 if self.mode == "channels" else self.frames

    def check(self, x: Tensor) -> None:
        """Refuse an input that is no batch of recordings with F frames.

        Args:
            x: Input of the network.

        Raises:
            QsdError: If it is none.
        """
        if x.dim() != 5 or x.shape[1] != self.frames:
            raise QsdError(
                f"the input has the shape {list(x.shape)}, where recordings [B, F, C, H, W] with F={self.frames} "
                "frames are expected; add the batch dimension to a single recording with unsqueeze(0), or build the "
                "network with another number of frames."
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, F, C, H, W]`` to ``[F * B, C, H, W]`` or ``[B, F * C, H, W]``."""
        self.check(x)
        return x.flatten(1, 2) if self.mode == "channels" else x.transpose(0, 1).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"frames={self.frames}, mode={self.mode!r}"


class FrameMean(nn.Module):
    """The mean of a network's output over the frames.

    Args:
        frames: Number F of frames.
    """

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def forward(self, output: Any) -> Any:
        """``[F * B, ...]`` to ``[B, ...]``, for every tensor of the output."""
        return tree_map_only(Tensor, lambda x: x.unflatten(0, (self.frames, -1)).mean(0), output)

    def extra_repr(self) -> str:
        return f"frames={self.frames}"


def keep_membranes(model: nn.Module, frames: int, decay: float) -> None:
    """Let every neuron of a network hand its remainder on to the next frame, except the input's event counts.

    Args:
        model: A network of spiking neurons.
        frames: Number F of frames.
        decay: Share of the remainder that is handed on, 0 to 1.

    Raises:
        QsdError: If the decay is out of range, or the network is a float twin.
    """
    check_number("decay", decay, 0, 1)
    if any(isinstance(module, FloatNeuron) for module in model.modules()):
        raise QsdError("over_frames='membrane' needs spiking neurons, and a float twin has none; use 'average'.")
    for neuron in frame_neurons(model):
        neuron.memory = FrameMemory(frames, float(decay))


def frame_neurons(model: nn.Module) -> Iterator[SpikeNeuron]:
    """The neurons of a network that may have a memory over frames.

    Args:
        model: Any module.
    """
    for module in model.modules():
        if isinstance(module, SpikeNeuron) and not isinstance(module, EventCounts):
            yield module


def channels_last(images: Tensor) -> Tensor:
    """A batch in the layout in which convolutions run up to twice as fast. All layers keep the layout of their input.

    Args:
        images: Images ``[B, C, H, W]``, or recordings ``[B, F, C, H, W]``, whose frames become images in this layout.
    """
    if images.dim() == 5:
        return images.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3)
    return images.contiguous(memory_format=torch.channels_last)


def event_example(axis: FrameAxis | None, images: Tensor, time_steps: int | None, generator: torch.Generator) -> Tensor:
    """A random input in the form that a network over frames expects.

    Args:
        axis: The frame axis of the network, or ``None`` for a network of images.
        images: Random images ``[B, C, H, W]`` in the form that the network's first convolution expects.
        time_steps: T where the network's input are event counts, else ``None``.
        generator: Source of chance.
    """
    if axis is not None:
        channels = images.shape[1] // (axis.frames if axis.mode == "channels" else 1)
        shape = (len(images), axis.frames, channels, *images.shape[2:])
        images = torch.randn(shape, generator=generator, dtype=images.dtype)
    if time_steps is not None:
        images = (images.abs() * time_steps / 2).floor()
    return images
