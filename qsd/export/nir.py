"""Converted networks as files of the Neuromorphic Intermediate Representation (NIR), for chips and simulators."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import qsd.export.nir_layers  # noqa: F401 - registers the writers of the engine's layers
from qsd.errors import QsdError
from qsd.export.graph import check_target
from qsd.export.nir_graph import NirGraph
from qsd.spiking import SpikingNetwork


def to_nir(
    spiking: SpikingNetwork,
    path: str | Path,
    largest_pixel: float = 8.0,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a converted network as a NIR graph (HDF5) with a schedule beside it (JSON).

    Every step evaluates all nodes in order. Feed the image in the first T steps and nothing afterwards, and each input
    ``clock.NEURON`` as the schedule says: its channel 0 gets the pulses, ``{step: value}``, everywhere; in step 1, its
    channel ``1 + k`` gets a 1 wherever ``start`` is k. After ``steps`` steps the membrane of ``sums`` holds the logits.
    The neurons must reset by subtraction of their threshold and let membranes become negative; NIR cannot say so, and
    backends differ. Early currents of residual connections charge a neuron at once, which changes no count, since
    delays are lossless.

    Args:
        spiking: Network with lossless delays, and without products of activations: attention is refused, since NIR has
            no node for it. Parts of a network can be converted and written one by one.
        path: File to write, ``.nir``; the schedule gets its name with ``.json`` appended.
        largest_pixel: Largest absolute value of a normalised pixel, up to which closed windows stay closed.
        notes: Further facts to keep in the schedule, as JSON.

    Returns:
        The path of the schedule.

    Raises:
        QsdError: If the package ``nir`` is missing, for what NIR cannot express, and if a file cannot be written.
    """
    path = Path(path)
    try:
        import nir
    except ImportError as error:
        raise QsdError("writing NIR files needs more packages: pip install 'qsd[export]'.") from error
    check_target(spiking, path)
    writer = NirGraph(spiking, largest_pixel)
    graph, length = writer.write()
    schedule = {"time_steps": spiking.time_steps, "steps": length, "clocks": writer.clocks, "notes": dict(notes or {})}
    plan = path.with_name(f"{path.name}.json")
    partial, partial_plan = (target.with_name(f"{target.name}.part") for target in (path, plan))
    try:
        nir.write(partial, graph)
        partial_plan.write_text(json.dumps(schedule))
        partial.replace(path)
        partial_plan.replace(plan)
    except OSError as error:
        raise QsdError(f"{path} cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)
        partial_plan.unlink(missing_ok=True)
    return plan
