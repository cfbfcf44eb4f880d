"""Converted networks as files of the Neuromorphic Intermediate Representation (NIR), for chips and simulators.

Every step evaluates all nodes in order. Feed the image in the first T steps and nothing afterwards, and each input
``clock.NEURON`` as the schedule says: its channel 0 gets the pulses, ``{step: value}``, everywhere; in step 1, its
channel ``1 + k`` gets a 1 wherever ``start`` is k. After ``steps`` steps the membrane of ``sums`` holds the logits.
The neurons must reset by subtraction of their threshold and let membranes become negative; NIR cannot say so, and
backends differ. Early currents of residual connections charge a neuron at once, which changes no count, since
delays are lossless.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import qsd.export.nir_layers  # noqa: F401 - registers the writers of the engine's layers
from qsd.errors import QsdError
from qsd.export.graph import check_target
from qsd.export.nir_graph import NirGraph
from qsd.export.notes import check_notes
from qsd.files import replacing
from qsd.spiking import SpikingNetwork


def to_nir(
    spiking: SpikingNetwork,
    path: str | Path,
    largest_pixel: float = 8.0,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a converted network as a NIR graph (HDF5) with a schedule beside it (JSON).

    The head of this module describes how the graph is run.

    Args:
        spiking: Network of the unary code with lossless delays, and without products of activations: attention is
            refused, since NIR has no node for it. Parts of a network can be converted and written one by one.
        path: File to write, ``.nir``; the schedule gets its name with ``.json`` appended.
        largest_pixel: Largest absolute value of a normalised pixel, up to which closed windows stay closed.
        notes: Further facts to keep in the schedule, as JSON.

    Returns:
        The path of the schedule.

    Raises:
        QsdError: If the package ``nir`` is missing, a layer has no writer, NIR cannot express an operation, or a file
            cannot be written.
    """
    try:
        import nir
    except ImportError as error:
        raise QsdError("writing NIR files needs more packages: pip install 'qsd[export]'.") from error
    check_target(spiking, path := Path(path))
    if spiking.code.name != "unary":
        raise QsdError(
            "NIR's neurons have one threshold for all time steps, which the binary code does not; convert with "
            "code='unary'."
        )
    facts = check_notes(notes)
    writer = NirGraph(spiking, largest_pixel)
    graph, steps = writer.write()
    schedule = {"time_steps": spiking.time_steps, "steps": steps, "clocks": writer.clocks, "notes": facts}
    plan = path.with_name(f"{path.name}.json")
    content = io.BytesIO()  # HDF5 locks the files that it writes, and `replacing` does so itself.
    nir.write(content, graph)
    with replacing(path) as partial, replacing(plan) as partial_plan:
        partial.write_bytes(content.getvalue())
        partial_plan.write_text(json.dumps(schedule))
    return plan
