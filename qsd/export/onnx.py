"""Writing a converted network as an ONNX file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsd._version import __version__
from qsd.errors import QsdError
from qsd.export.graph import check_target, trace
from qsd.export.integers import IntegerGraph, calibrate
from qsd.export.notes import check_notes, write_note
from qsd.files import replacing
from qsd.spiking import SpikingNetwork
from qsd.spiking.batches import Images, image_batches
from qsd.spiking.rules import Merge


def to_onnx(
    spiking: SpikingNetwork,
    path: str | Path,
    integer: bool = False,
    images: Images | None = None,
    notes: Mapping[str, Any] | None = None,
    round_inner: Merge = True,
) -> None:
    """Write a converted network as an ONNX file, for any runtime: its count domain, in one pass.

    The graph takes ``images`` ``[B, C, H, W]`` (float32, any B) and gives ``logits`` ``[B, classes]``. Its metadata
    have one entry, ``qsd``: JSON with ``kind``, ``time_steps``, ``image`` (``[C, H, W]``), ``inner`` and ``notes``.

    In floats it is the network that `SpikingNetwork` evaluates. In integers (ours) spike counts are unsigned bytes,
    weights signed bytes with values of their 2 to 8 bits (perhaps times a power of two), and convolutions on spikes are
    integer ones. Where spikes are all that a layer sees and gives, the same counts come out, for every input. Values
    between the convolutions of a chain (RepConv, SepConv) are rounded to 8 bits, on a grid from their least to their
    largest value on the images; biases of such a chain to integers. ``inner`` tells the grids: least and largest step
    of the channels, and the level of 0. A count that tips so can tip others. ``round_inner=False`` computes these
    chains in floats, from weights of 8 bits, and with exact counts; with ``merged_bits=8`` in `qsd.to_spike_driven`
    there are no inner values. The first layer, which sees the image, the sums of currents between blocks and
    attention's products (of integers) are floats always.

    Args:
        spiking: with lossless delays: the file knows no time.
        path: file to write; one that exists is replaced.
        integer: write integers, which needs quantized weights.
        images: whose height and width the file will take, and for integers, whose ranges are measured; a tensor or a
            data loader. ``None`` for the size of ``spiking.example``.
        notes: further facts to keep, as JSON: names of classes, normalisation.
        round_inner: chains whose inner values become integers: True, False, ``"rep"`` (RepConv) or ``"sep"`` (SepConv).

    Raises:
        QsdError: if packages are missing, a delay is below T - 1, weights are floats where integers are asked for, or
            the file cannot be written.
    """
    path = Path(path)
    check_target(spiking, path)
    if round_inner not in (True, False, "rep", "sep"):
        raise QsdError(f"round_inner={round_inner!r} is unknown; use True, False, 'rep' or 'sep'.")
    facts = check_notes(notes)
    grids = calibrate(spiking, images, round_inner) if integer else {}
    example = spiking.example if images is None else next(image_batches(images, spiking, max_images=1))[0]
    model = trace(spiking, example, whole_layers=integer)
    if integer:
        IntegerGraph(spiking, model, grids).write_out()
    model.producer_name, model.producer_version = "qsd", __version__
    kind = "integer" if integer else "float"
    for key, value in write_note(kind, spiking.time_steps, example.shape[1:], grids, facts).items():
        model.metadata_props.add(key=key, value=value)
    with replacing(path) as partial:
        partial.write_bytes(model.SerializeToString())
