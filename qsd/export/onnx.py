"""Converted networks as ONNX files, in floats or in integers.

A file with floats holds the network that `SpikingNetwork` evaluates. In a file with integers (ours) spike counts are
unsigned bytes, weights are signed bytes with values of their 2 to 8 bits (perhaps times a power of two), and
convolutions of spikes are integer convolutions. A layer whose input and output are spikes gives the same counts, for
every input.

Values between the convolutions of a chain (RepConv, SepConv) are rounded to 8 bits, on a grid from their least to
their largest value on the images, and biases of such a chain are rounded to integers. ``inner`` holds the grids:
least and largest unit of the channels, and the level of 0. A count that changes by such a rounding can change counts
after it. ``round_inner="none"`` computes these chains in floats, from weights of 8 bits, and with exact counts; with
``merged_bits=8`` in `qsd.to_spike_driven` there are no inner values. The first layer, whose input is the image, the
sums of currents between blocks and the products of attention (of integers) are always floats.

The graph of a network over frames takes one frame, and the output for a recording is the mean of the logits of its
frames (where frames are channels, it takes ``[B, F, C, H, W]``). The membranes of neurons with a memory are further
inputs and outputs: ``state.NAME`` is zero for the first frame and ``next.NAME`` of the frame before for the others.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import qsd.export.integer_layers  # noqa: F401 - registers the writers of the engine's layers
from qsd._version import __version__
from qsd.errors import QsdError
from qsd.export.graph import check_target, trace
from qsd.export.grids import calibrate
from qsd.export.integers import IntegerGraph, writes
from qsd.export.notes import check_notes, write_note
from qsd.files import replacing
from qsd.spiking import SpikingNetwork
from qsd.spiking.batches import Images, image_batches
from qsd.spiking.merging import Merge


def to_onnx(
    spiking: SpikingNetwork,
    path: str | Path,
    integer: bool = False,
    images: Images | None = None,
    notes: Mapping[str, Any] | None = None,
    round_inner: Merge = "all",
    standard: bool = False,
    compact: bool = False,
) -> None:
    """Write a converted network as an ONNX file, for any runtime: its count domain, in one pass.

    The graph takes ``images`` ``[B, C, H, W]`` (float32, any B) and gives ``logits`` ``[B, classes]``. Its metadata
    have one entry, ``qsd``: JSON with ``kind``, ``time_steps``, ``image`` (``[C, H, W]``), ``inner`` and ``notes``.

    The two kinds of files are described at the head of this module.

    Args:
        spiking: Network with lossless delays, of either code, because the file has no time steps.
        path: File to write; one that exists is replaced.
        integer: Whether to write integers, which needs quantized weights.
        images: Images, a tensor or a data loader, of the height and width that the file will take. For integers the
            ranges of inner values are measured on them. ``None`` for the size of ``spiking.example``.
        notes: Further facts to keep, as JSON: names of classes, normalisation.
        round_inner: Chains whose inner values become integers: ``"all"``, ``"none"``, ``"rep"`` (RepConv) or ``"sep"``
            (SepConv); True and False stand for all and none.
        standard: Whether an integer file has operations of the ONNX standard alone, which OpenVINO runs too. Else it
            has one of ONNX Runtime itself, which is faster there.
        compact: Whether weights of 4 bits are words of a dictionary (`qsd.export.words`), for older runtimes too.

    Raises:
        QsdError: If packages are missing, a delay is below T - 1, weights are floats where integers are asked for, a
            layer has no writer, or the file cannot be written.
    """
    _check(spiking, Path(path), integer, round_inner)
    facts = check_notes(notes)
    grids = calibrate(spiking, images, round_inner) if integer else {}
    example = spiking.example if images is None else next(image_batches(images, spiking, max_images=1))[0]
    model = trace(spiking, example, writes if integer else None)
    if integer:
        IntegerGraph(spiking, model, grids, standard, compact).write_out()
    kind, frames = "integer" if integer else "float", example.shape[1] if example.dim() == 5 else None
    _sign(model, write_note(kind, spiking.time_steps, example.shape[-3:], grids, facts, frames))
    with replacing(path) as partial:
        partial.write_bytes(model.SerializeToString())


def _sign(model: Any, note: Mapping[str, str]) -> None:
    """Put the note and the producer into a model."""
    model.producer_name, model.producer_version = "qsd", __version__
    for key, value in note.items():
        model.metadata_props.add(key=key, value=value)


def _check(spiking: SpikingNetwork, path: Path, integer: bool, round_inner: Merge) -> None:
    """Refuse options that no file can have."""
    check_target(spiking, path)
    if round_inner not in (True, False, "all", "none", "rep", "sep"):
        raise QsdError(f"round_inner={round_inner!r} is unknown; use 'all', 'none', 'rep' or 'sep'.")
    keeping = next((name for name, neuron in spiking.neurons().items() if neuron.memory is not None), None)
    if integer and keeping is not None:
        raise QsdError(
            f"neuron {keeping} keeps its membrane from frame to frame, which integer files do not hold; write floats "
            "(integer=False)."
        )
