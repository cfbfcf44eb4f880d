"""From a network of binary spikes with real weights to one of integers alone."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

import qsd.integer.activations  # noqa: F401 - registers converters
from qsd.errors import QsdError
from qsd.integer import description
from qsd.integer.builder import Builder, TooWide
from qsd.integer.convolutions import first_scale
from qsd.integer.margins import ChangedCount
from qsd.integer.network import IntegerNetwork
from qsd.integer.pixels import Bytes, PixelGrid
from qsd.integer.signals import Integers, Signal
from qsd.integer.simulator import run_counts
from qsd.integer.streams import Streams
from qsd.integer.tracing import Flow, trace
from qsd.spiking import SpikingNetwork
from qsd.spiking.batches import Images, image_batches
from qsd.spiking.counts import count_spikes

IMAGE = "image"
_TRIED_BITS = (8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
_TRIAL_BITS = 20
# Pixels of the images on which bits are searched: 256 images of 32 x 32 pixels, 5 of 224 x 224.
_SEARCHED_PIXELS = 2**18
# A search ends when so many further trials have changed nothing.
_PATIENCE = 2


@torch.no_grad()
def to_integer(
    spiking: SpikingNetwork,
    images: Images,
    fractional_bits: int | None = None,
    inner_bits: int = 24,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    events: bool = False,
) -> IntegerNetwork:
    """A network whose pixels, weights, membranes, thresholds and products are integers of stated widths.

    A neuron that sees one layer counts exactly as before, by T integer thresholds for each channel. In running sums of
    several branches the weights stand for wide integers in a common unit. Chains of convolutions that were merged with
    ``merged_bits`` are one convolution each. Others stay a chain, whose inner values are integers that are multiplied.
    No range can overflow: widths follow from the weights, for every image.

    Args:
        spiking: Network with quantized weights and lossless delays, of the unary code.
        images: Normalised images ``[B, C, H, W]``, or a data loader. They set the size of images, and on those of
            the first 262144 pixels the fractional bits are searched.
        fractional_bits: Bits behind the point of running sums, in thresholds; a channel whose range leaves room for
            fewer in 32 bits has fewer. ``None`` for the fewest (8 to 30) with which all counts on the images are those
            of the network in float64, or as many as possible are.
        inner_bits: Largest width of the values between the convolutions of a chain that is not merged, 4 to 24. They
            are narrower where the sums behind them would else need more than 32 bits.
        mean: Mean by channel of the normalisation of the images, so that bytes are those of the image file; ``None``
            for bytes over the range of the images.
        std: Standard deviation by channel of the same normalisation.
        events: Whether images are counts of events from 0 to T. They are spikes, so that no layer multiplies.

    Returns:
        The integer network, for images of this size.

    Raises:
        QsdError: For float weights, early neurons, the binary code, layers without integers, and sums that need more
            than 32 bits, with the name of the layer.
    """
    _check(spiking, fractional_bits, inner_bits)
    exact = copy.deepcopy(spiking).cpu().double()
    examples = _examples(images, exact)
    grid = PixelGrid.of_events(examples) if events else PixelGrid.of(examples, mean, std)
    flow, pixels = trace(exact, examples[:1]), grid.pixels(examples)
    if fractional_bits is not None:
        return _build(exact, flow, grid, fractional_bits, inner_bits)
    return _searched(exact, flow, grid, inner_bits, pixels)


def _examples(images: Images, exact: SpikingNetwork) -> Tensor:
    """The first images of one size, as many as bits are searched on."""
    batches: list[Tensor] = []
    most = 1
    for batch, _ in image_batches(images, exact):
        if batches and batch.shape[1:] != batches[0].shape[1:]:
            continue
        batches.append(batch)
        most = max(1, _SEARCHED_PIXELS // batch.shape[2:].numel())
        if sum(map(len, batches)) >= most:
            break
    return torch.cat(batches)[:most]


def _check(spiking: SpikingNetwork, fractional_bits: int | None, inner_bits: int) -> None:
    if (early := spiking.early_neuron()) is not None:
        raise QsdError(
            f"neuron {early.name} fires before its input is complete, and an integer network waits for all of it; "
            "convert with the lossless delays, delay=None."
        )
    if spiking.code.name != "unary":
        raise QsdError("the network has the binary code, and an integer network the unary one; use code='unary'.")
    if spiking.currents:
        raise QsdError("the network takes currents, and an integer network takes images; convert the whole network.")
    if spiking.example.dim() == 5:
        raise QsdError("the network takes the frames of recordings, and an integer network takes images.")
    if fractional_bits is not None and not 1 <= fractional_bits <= 30:
        raise QsdError(f"fractional_bits={fractional_bits} is not from 1 to 30.")
    if not 4 <= inner_bits <= 24:
        raise QsdError(f"inner_bits={inner_bits} is not from 4 to 24.")


def _searched(exact: SpikingNetwork, flow: Flow, grid: PixelGrid, inner_bits: int, pixels: Bytes) -> IntegerNetwork:
    """The network of the fewest fractional bits with which the fewest images have a changed count."""
    expected = count_spikes(exact, grid.images(pixels))
    search: dict[int, int] = {}
    best: IntegerNetwork | None = None
    for bits in _TRIED_BITS:
        try:
            network = _build(exact, flow, grid, bits, inner_bits)
        except TooWide:
            if best is None:
                raise
            break
        network.changed = _changed(network, pixels, expected)
        search[bits] = len(network.changed)
        if best is None or search[bits] < min(search[tried] for tried in search if tried != bits):
            best = network
        last = [*search.values()][-1 - _PATIENCE :]
        stuck = len(last) > _PATIENCE and len({*last}) == 1 and last[0] < len(pixels)
        if not search[bits] or stuck:
            break
    assert best is not None
    best.search = search
    return best


def _fast_matmul(left: Integers, right: Integers) -> Integers:
    """The product in float64, which is exact because no sum needs more than 32 bits."""
    return np.matmul(left.astype(np.float64), right.astype(np.float64)).astype(np.int64)


def _changed(network: IntegerNetwork, pixels: Bytes, expected: dict[str, Tensor]) -> list[ChangedCount]:
    """The images with a changed count."""
    changed: list[ChangedCount] = []
    for part in range(0, len(pixels), 8):
        values = run_counts(network.description, network.arrays, pixels[part : part + 8], _fast_matmul)
        wanted = {name: count[part : part + 8] for name, count in expected.items()}
        found = network.changed_counts(values, wanted)
        changed += [replace(reason, image=part + reason.image) for reason in found]
    return changed


def _build(exact: SpikingNetwork, flow: Flow, grid: PixelGrid, fractional_bits: int, inner_bits: int) -> IntegerNetwork:
    """The integer network of these widths. A trial tells the ranges of running sums."""
    image_unit = np.ones(1) if grid.events else grid.table()[1]
    scale_of = partial(first_scale, spiking=exact, image_unit=image_unit)
    streams = Streams.of(flow, _TRIAL_BITS, scale_of)
    signals = _convert(flow, grid, Builder(exact, streams, inner_bits, trial=True))
    least = streams.least(flow, signals)
    builder = Builder(exact, Streams.of(flow, fractional_bits, scale_of, least), inner_bits)
    output = _convert(flow, grid, builder)[flow.output]
    if output.content != "currents" or np.ptp(output.unit) or output.offset.any():
        raise QsdError(
            f"the network ends with {output.name}, which is no classifier of spikes; give it a head of ours."
        )
    facts = description.Description(
        time_steps=exact.time_steps,
        fractional_bits=fractional_bits,
        inner_bits=inner_bits,
        mean=list(grid.mean),
        std=list(grid.std),
        output=output.name,
        output_unit=float(output.unit.flat[0]),
        layers=builder.layers,
    )
    return IntegerNetwork(facts, builder.arrays, grid, builder.margins)


def _convert(flow: Flow, grid: PixelGrid, builder: Builder) -> dict[int, Signal]:
    """Add the layers of all calls; the signals by number of a value."""
    signals = {0: _image(flow, grid, builder)}
    for call in flow.calls:
        signals[call.output] = builder.convert(call, [signals[value] for value in call.inputs])
    return signals


def _image(flow: Flow, grid: PixelGrid, builder: Builder) -> Signal:
    if grid.events:
        counts = Signal.of_counts(IMAGE, flow.image, builder.time_steps)
        return builder.add(description.Events, counts, [])
    table, unit, offset, error = grid.table()
    low, high = np.minimum(table.min(1), 0), np.maximum(table.max(1), 0)
    signal = Signal(IMAGE, flow.image, "image", low, high, unit, offset, error, multiplied=True)
    builder.add(description.Pixels, signal, [])
    builder.keep(IMAGE, "table", table)
    return signal
