"""Images and frames in a row: on one clock, their order of arrival and their outputs; and one frame after another."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from qsd.errors import QsdError
from qsd.spiking.clock import Clock
from qsd.spiking.layers import SpikingFrameAxis
from qsd.spiking.results import Stream
from qsd.spiking.runtime import Runtime
from qsd.spiking.signals import plain

if TYPE_CHECKING:
    from qsd.spiking.network import SpikingNetwork

State = Mapping[str, Tensor]


def in_a_row(network: nn.Module, batches: list[Tensor], frames: int) -> list[Tensor]:
    """Batches of images in the order of arrival: recordings are taken apart into their frames.

    Args:
        network: The converted modules.
        batches: Images ``[B, C, H, W]``, or recordings ``[B, F, C, H, W]``.
        frames: Frames of a recording that follow one another; 1 for images.
    """
    if frames == 1:
        return batches
    for layer in network.modules():
        if isinstance(layer, SpikingFrameAxis):
            for batch in batches:
                layer.check(batch)
    return [frame for batch in batches for frame in batch.unbind(1)]


def read_output(output: Any, clock: Clock, stream: Stream, runtime: Runtime) -> None:
    """Accumulate a tick's output, all parts of which wait for the latest, over its window and over all frames.

    Args:
        output: Output of the network in this tick.
        clock: The clock.
        stream: Receives outputs, and the ticks in which they are complete.
        runtime: Runtime of the network.
    """
    leaves, structure = tree_flatten(output)
    aligned, arrival = runtime.aligned(tuple(leaves))
    parts = [plain(x) if clock.frames == 1 else plain(x) / clock.frames for x in aligned]
    number, step = clock.image(arrival)
    frame = number % clock.frames
    if step == 1 and frame == 0:
        stream.logits.append(tree_unflatten(parts, structure))
    elif 1 <= step <= clock.time_steps:
        sums = tree_leaves(stream.logits[-1])
        stream.logits[-1] = tree_unflatten([total + part for total, part in zip(sums, parts)], structure)
    if step == clock.time_steps and frame == clock.frames - 1:
        stream.finished.append(clock.tick)


@torch.no_grad()
def run_frame(spiking: "SpikingNetwork", frame: Tensor, state: State | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Run one frame of recordings in the count domain, as frames arrive from a sensor.

    The mean of the logits over all frames is the network's output for the whole recordings.

    Args:
        spiking: Converted network over frames, ``"average"`` or ``"membrane"``, with lossless delays.
        frame: ``[B, C, H, W]``.
        state: What the frame before returned; ``None`` for the first frame of a recording.

    Returns:
        Logits of the frame ``[B, classes]``, and the remainders of the neurons with a memory by name, in thresholds.

    Raises:
        QsdError: If the state is that of another number of recordings.
    """
    for left in (state or {}).values():
        if len(left) != len(frame):
            raise QsdError(
                f"the state is that of {len(left)} recordings, and the frame that of {len(frame)}; begin other "
                "recordings without a state."
            )
    with spiking.runtime.running("count", remainders=dict(state or {})) as run:
        logits = spiking.network(frame)
    assert run.remainders is not None
    return logits, run.remainders
