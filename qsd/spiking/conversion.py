"""Conversion of a trained network into one of binary spikes, with the check that both count alike."""

import copy
import logging

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qsd.errors import QsdError
from qsd.layers import QuantConv2d
from qsd.layers.frames import EventCounts, FrameAxis, event_example
from qsd.layers.wrappers import unwrapped
from qsd.models.compact import CompactModel
from qsd.neurons import LearnedStepNeuron, SpikeNeuron
from qsd.spiking.codes import CodeName
from qsd.spiking.counts import named_calls, watch_neurons
from qsd.spiking.merging import Merge, check_merge, merge_choice
from qsd.spiking.names import Delay, check_delay, delay_choice
from qsd.spiking.network import SpikingNetwork
from qsd.spiking.rules import Conversion
from qsd.spiking.runtime import Runtime

logger = logging.getLogger(__name__)


@torch.no_grad()
def to_spike_driven(
    model: nn.Module,
    delay: Delay = None,
    merge: Merge = "all",
    merged_bits: int | None = None,
    example: Tensor | None = None,
    time_steps: int | None = None,
    currents: bool = False,
    code: CodeName = "unary",
) -> SpikingNetwork:
    """Convert a trained network into one whose neurons exchange binary spikes, without losing anything.

    Batch norms and layer scales go into weights, attention's scale into the threshold of its neuron. Before it returns,
    an image is run through the trained network and both forms of the new one, in float64, and all counts are compared.

    Args:
        model: A model of this package, or built from its layers; it is not changed. It may be compiled, or wrapped by
            ``DataParallel`` or ``DistributedDataParallel``.
        delay: Time steps that neurons wait, for all or by name or glob; ``None`` for the shortest lossless delay, T - 1
            in the unary code.
        merge: Chains of convolutions without a neuron between (RepConv, SepConv) that become one convolution each, so
            that every synaptic operation but the first sees spikes: ``"all"``, ``"none"``, ``"rep"`` or ``"sep"``. True
            and False stand for ``"all"`` and ``"none"``.
        merged_bits: Bits to quantize the merged kernels to (symmetric, per output channel), which is not lossless.
        example: An input ``[1, ...]`` to compare with; ``None`` for a random image of 32 x 32 pixels, or of as many as
            the network needs.
        time_steps: Another T than that of the training, for neurons of learned steps (CSDformer). They keep their range
            and divide it anew, which is another network: a warning tells the consequences.
        currents: Whether the input is no image but currents that neurons see at once: their sums over a window, of
            which a T-th arrives in each step. A network that is cut at a decision without spikes, such as the choice
            of regions in a detector, has such a second part.
        code: ``"unary"``: a count n travels as n spikes in T steps. ``"binary"``: it travels as its binary digits, in
            ``ceil(log2(T + 1))`` steps, and currents are shifted; neurons cannot fire early then.

    Returns:
        The spiking network.

    Raises:
        QsdError: For a layer without a conversion rule, a float model, an unknown code, a delay that the code does not
            allow, or counts that differ (say, because of a functional ReLU in the model's own ``forward``).
    """
    model = unwrapped(model)
    if time_steps is not None:
        model = _with_time_steps(model, time_steps)
    return convert(model, delay, merge, merged_bits, example, check=True, currents=currents, code=code)


@torch.no_grad()
def convert(
    model: nn.Module,
    delay: Delay,
    merge: Merge,
    merged_bits: int | None,
    example: Tensor | None,
    check: bool,
    currents: bool = False,
    code: CodeName = "unary",
) -> SpikingNetwork:
    """`to_spike_driven` with or without its check, for networks that were checked before.

    Args:
        model: Trained model.
        delay: Delays of neurons.
        merge: Chains that are merged.
        merged_bits: Bits of merged kernels.
        example: Input to trace and to compare with.
        check: Whether all counts are compared.
        currents: Whether the input is currents.
        code: How counts travel as spikes.
    """
    check_merge(merge := merge_choice(merge), merged_bits)
    time_steps = _time_steps(model)
    example = (_random_image(model) if example is None else example).to("cpu", torch.float64)
    parameter = next(model.parameters())
    choose, runtime = delay_choice(delay), Runtime(time_steps, code)
    lossless = runtime.code.lossless_delay
    conversion = Conversion(runtime, lambda name: choose(name, lossless), merge, merged_bits is not None)
    # Converted in float64, so that folding rounds once; the trained model keeps its type, and the weights are on the
    # grid points that they have in it (a weight between two of them could go to the other one in float64).
    compact = CompactModel.of(model)
    trained = copy.deepcopy(model).double().eval()
    compact.load_into(trained, torch.float64)
    compared = check and merged_bits is None  # The conversion takes apart what it gets.
    network = conversion.convert(copy.deepcopy(trained) if compared else trained, "")
    spiking = SpikingNetwork(network, conversion.runtime, example, compact, merge, merged_bits, currents)
    spiking.to(parameter.device)
    check_delay(delay, spiking.neurons())
    spiking.absorb_amplitudes()
    if merged_bits is not None:
        _quantize_merged(spiking, merged_bits, parameter.dtype)
    elif compared:
        _compare(trained, spiking)
    return spiking.to(parameter.dtype)


def _quantize_merged(spiking: SpikingNetwork, bits: int, dtype: torch.dtype) -> None:
    for chain in spiking.chains().values():
        if chain.merged is not None:
            chain.merged.quantize(bits, dtype)


def _time_steps(model: nn.Module) -> int:
    steps = {m.time_steps for m in model.modules() if isinstance(m, SpikeNeuron)}
    if len(steps) != 1:
        found = ", ".join(map(str, sorted(steps))) or "none"
        raise QsdError(f"all neurons need one number of time steps; found: {found}. Float twins cannot be converted.")
    return steps.pop()


def _random_image(model: nn.Module) -> Tensor:
    first = next((m.in_channels for m in model.modules() if isinstance(m, QuantConv2d)), 3)
    channels = getattr(model, "in_chans", first)
    generator = torch.Generator().manual_seed(0)
    side = max(32, getattr(model, "total_stride", 1))
    image = torch.randn(1, channels, side, side, generator=generator, dtype=torch.float64)
    axis = next((m for m in model.modules() if isinstance(m, FrameAxis)), None)
    events = next((m.time_steps for m in model.modules() if isinstance(m, EventCounts)), None)
    return event_example(axis, image, events, generator)


def _with_time_steps(model: nn.Module, time_steps: int) -> nn.Module:
    """A copy whose neurons have another T, with a warning if that is not the one that it was trained with."""
    neurons = [m for m in model.modules() if isinstance(m, SpikeNeuron)]
    trained = sorted({neuron.time_steps for neuron in neurons})
    if trained in ([], [time_steps]):
        return model
    if not all(isinstance(neuron, LearnedStepNeuron) for neuron in neurons):
        raise QsdError(
            f"time_steps={time_steps}: neurons of a fixed step were trained with T = {trained[0]} and cannot take "
            "another; train the model with that T."
        )
    model = copy.deepcopy(model)
    for neuron in model.modules():
        if isinstance(neuron, LearnedStepNeuron):
            neuron.change_time_steps(time_steps)
    if isinstance(registered := getattr(model, "registered", None), dict):
        registered["arguments"]["time_steps"] = time_steps
    logger.warning(
        "trained with T = %d and converted with T = %d: every neuron rounds to other values, %.2g times as coarse, so "
        "the result equals a network that was never trained. Expect to lose accuracy, the more the smaller T is: "
        "measure it, or train with time_steps=%d.",
        trained[0], time_steps, trained[0] / time_steps, time_steps,
    )  # fmt: skip
    return model


def _compare(trained: nn.Module, spiking: SpikingNetwork) -> None:
    images = spiking.example
    with watch_neurons(trained, lambda neuron, *inputs: neuron.counts(*inputs)) as calls:
        outputs = tree_leaves(trained(images))
    expected_counts = named_calls(calls)
    counted: dict[str, Tensor] = {}
    stepped: dict[str, Tensor] = {}
    with spiking.runtime.counting(counted), spiking.runtime.running("count"):
        logits = spiking.network(images)
    with spiking.runtime.counting(stepped):
        summed = spiking.simulate(images, delay=spiking.lossless_delay).logits
    for way, counts in (("count domain", counted), ("simulation", stepped)):
        for name, count in expected_counts.items():
            if name not in counts or not torch.equal(count, counts[name]):
                raise QsdError(
                    f"the {way} differs from the trained network at neuron {name}: something in the model's forward is "
                    "no layer of qsd (a functional ReLU, a constant that is added, ...); make it one."
                )
    pairs = [pair for way in (logits, summed) for pair in zip(tree_leaves(way), outputs)]
    if not all(torch.allclose(output, expected, rtol=1e-9, atol=1e-9) for output, expected in pairs):
        raise QsdError(
            "the converted network's output differs although all counts are equal: what follows the last neuron is no "
            "layer of qsd; make it one."
        )
