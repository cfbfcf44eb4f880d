"""Where and when a converted network fires for one image: firing rates by stage, attention, and spikes over time."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qsd.errors import QsdError
from qsd.precision import full_float32
from qsd.spiking.codes import Code
from qsd.spiking.layers import TimedLayer
from qsd.spiking.network import SpikingNetwork


@dataclass
class Activity:
    """Spikes for one image. Stages and layers are in the order of execution.

    Attributes:
        rates: Firing rate by stage and position, spikes per neuron and time step, ``[H, W]`` of the stage's finest map.
        responses: By attention layer without a matrix, the mean count of each token's response as share of T,
            ``[H, W]``.
        matrices: By attention layer with a matrix of queries by keys, its mean over heads as shares of T, ``[N, N]``.
        received: By attention layer with a matrix, the mean attention that each token receives, ``[H, W]``.
        over_time: By stage, spikes per neuron in each time step of the global clock.
        latency: Time steps from the first input to the last output.
    """

    rates: dict[str, Tensor] = field(default_factory=dict)
    responses: dict[str, Tensor] = field(default_factory=dict)
    matrices: dict[str, Tensor] = field(default_factory=dict)
    received: dict[str, Tensor] = field(default_factory=dict)
    over_time: dict[str, list[float]] = field(default_factory=dict)
    latency: int = 0


def name_in_network(name: str) -> str:
    """The name of a layer in the network that a detector or a segmenter has as its backbone.

    Args:
        name: Dotted name of the layer in the trained model.
    """
    return name.removeprefix("backbone.").removeprefix("model.")


def stage_of(name: str) -> str:
    """The stage that a layer belongs to: ``stages.2`` for ``backbone.model.stages.2.blocks.0.neuron``.

    Args:
        name: Dotted name of the layer in the trained model; a name without stages begins with its own, as ``head``.
    """
    parts = name_in_network(name.partition("@")[0]).split(".")
    return ".".join(parts[:2]) if len(parts) > 2 and parts[1].isdecimal() else parts[0]


@torch.no_grad()
@full_float32()
def measure_activity(spiking: SpikingNetwork, image: Tensor) -> Activity:
    """Step through one image and look where and when its spikes fall.

    Args:
        spiking: The converted network.
        image: ``[1, C, H, W]``, or a recording ``[1, F, C, H, W]``. Rates are means over its frames.

    Raises:
        QsdError: If there is not exactly one image.
    """
    if len(image) != 1:
        raise QsdError(f"{len(image)} images: the activity of one image is drawn at a time.")
    timeline: dict[str, dict[int, float]] = {}
    sizes: dict[str, int] = {}

    def hook(neuron: TimedLayer, _inputs: Any, output: Any) -> None:
        if spiking.runtime.mode != "step":
            return
        # [steps, F * B, ...]: frames follow one another, each an interval later.
        spikes = spiking.runtime.split(output.as_subclass(Tensor)).unflatten(1, (spiking.frames, -1))
        stage = stage_of(neuron.call)
        sizes[stage] = sizes.get(stage, 0) + spikes[0, 0].numel()
        fired = timeline.setdefault(stage, {})
        for step, counts in enumerate(torch.count_nonzero(spikes.flatten(2), 2).tolist()):
            for frame, count in enumerate(counts):
                at = output.arrival + step + frame * interval
                fired[at] = fired.get(at, 0.0) + count

    neurons = [layer for layer in spiking.layers().values() if layer.role == "neuron"]
    interval = spiking.interval()
    handles = [neuron.register_forward_hook(hook) for neuron in neurons]
    try:
        trace = spiking.simulate(image)
    finally:
        for handle in handles:
            handle.remove()
    activity = Activity(latency=trace.latency)
    _add_rates(activity, trace.counts, spiking.code)
    _add_attention(activity, trace.counts, spiking.time_steps)
    for stage, fired in timeline.items():
        activity.over_time[stage] = [fired.get(step, 0.0) / sizes[stage] for step in range(trace.latency)]
    return activity


def _add_rates(activity: Activity, counts: dict[str, Tensor], code: Code) -> None:
    """Means over channels and neurons; maps of a stage are brought to the size of its finest one."""
    maps: dict[str, list[Tensor]] = {}
    for call, count in counts.items():
        if count.dim() == 4 and not call.partition("@")[0].endswith("score_neuron"):
            rates = code.ones(count).double().mean(1) / code.steps
            maps.setdefault(stage_of(call), []).append(rates.mean(0, keepdim=True))
    for stage, found in maps.items():
        height, width = (max(x.shape[axis] for x in found) for axis in (1, 2))
        sized = [F.interpolate(x[None], (height, width), mode="nearest")[0, 0] for x in found]
        activity.rates[stage] = torch.stack(sized).mean(0)


def _add_attention(activity: Activity, counts: dict[str, Tensor], time_steps: int) -> None:
    """The taps of attention layers, which have fixed names."""
    for call, count in counts.items():
        path, _, neuron = call.rpartition(".")
        query, layer = counts.get(f"{path}.q_neuron"), name_in_network(path)
        if query is None:
            continue
        if neuron == "score_neuron":
            matrix = count.double().mean(0).mean(0) / time_steps
            activity.matrices[layer] = matrix
            activity.received[layer] = matrix.mean(0).view(query.shape[-2:])
        elif neuron == "attn_neuron" and f"{path}.score_neuron" not in counts:
            activity.responses[layer] = count.double().mean(0).mean(0) / time_steps
