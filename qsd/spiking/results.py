"""Results of the two ways to run a converted network over time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass
class Trace:
    """Result of `SpikingNetwork.simulate`. Names are those of the trained model's neurons, see `call_names`.

    Attributes:
        logits: Output of the network ``[B, classes]``, accumulated over its window (of a network with several
            outputs: the same structure of tensors).
        latency: Time steps on one global clock from the first input step to the last output step.
        spikes: Binary spikes ``[steps, B, ...]`` (bool) of the recorded neurons, in their own window: of T steps, in
            the binary code of as many as a count has digits.
        counts: Spike counts ``[B, ...]`` (uint8) of all neurons.
        membrane: Membrane potentials ``[steps + delay, B, ...]`` of the recorded neurons, after each step's charge.
    """

    logits: Any
    latency: int
    spikes: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    membrane: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Stream:
    """Result of `SpikingNetwork.stream`, a clocked run of images in a row.

    Attributes:
        logits: Outputs ``[B, classes]`` of every image, in order.
        finished: Tick in which each output was complete.
        latency: Ticks from the first input to the last output of an image.
        interval: Ticks between two images.
        counts: Spike counts ``[B, ...]`` (uint8) of the recorded neurons, for every image.
    """

    logits: list[Tensor]
    finished: list[int]
    latency: int
    interval: int
    counts: dict[str, list[Tensor]] = field(default_factory=dict)


def join_traces(traces: Sequence[Trace], frames: int = 1) -> Trace:
    """Join the traces of parts of a batch.

    Args:
        traces: One for each part, in order.
        frames: Frames of a recording; counts are those of all first frames, then of all second ones, and so on.
    """
    if len(traces) == 1:
        return traces[0]
    parts, structure = zip(*(tree_flatten(trace.logits) for trace in traces))
    joined = Trace(tree_unflatten([torch.cat(part) for part in zip(*parts)], structure[0]), traces[0].latency)
    for name in traces[0].counts:
        joined.counts[name] = _join([trace.counts[name] for trace in traces], 0, frames)
    for name in traces[0].spikes:
        joined.spikes[name] = _join([trace.spikes[name] for trace in traces], 1, frames)
        joined.membrane[name] = _join([trace.membrane[name] for trace in traces], 1, frames)
    return joined


def _join(parts: list[Tensor], axis: int, frames: int) -> Tensor:
    if frames == 1:
        return torch.cat(parts, axis)
    return torch.cat([part.unflatten(axis, (frames, -1)) for part in parts], axis + 1).flatten(axis, axis + 1)
