"""The three files of a conversion: packed network, record, page."""

import copy
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.packing import load_packed, save_packed
from qsd.report.page import findings, html
from qsd.report.recording import Record, record_conversion
from qsd.spiking import SpikingNetwork
from qsd.spiking.batches import image_batches

PACKED, RECORD, PAGE = FILES = ("spiking.safetensors", "conversion.json", "report.html")


def write_conversion(
    trained: nn.Module,
    loader: Iterable[Any],
    folder: str | Path,
    notes: Mapping[str, Any] | None = None,
    **options: Any,
) -> Record:
    """Convert a trained network, measure it, and write ``spiking.safetensors``, ``conversion.json``, ``report.html``.

    The packed network is loaded back, and must give the same logits, before anything gets its name: either all three
    files are complete, or none is written.

    Args:
        trained: see `record_conversion`.
        loader: see `record_conversion`.
        folder: where to; it is made if it does not exist. Files of an earlier conversion are replaced.
        notes: facts to keep in the packed file, such as the names of classes.
        **options: of `record_conversion`.

    Returns:
        The record.

    Raises:
        QsdError: see `record_conversion`; and if the files cannot be written or the packed one gives other logits.
    """
    with all_or_none(folder) as partial:
        spiking, record = record_conversion(trained, loader, **options)
        save_packed(spiking, partial / PACKED, notes)
        images, _ = next(iter(image_batches(loader, spiking, 8)))
        _check_packed(partial / PACKED, trained, spiking, images)
        write_record(record, partial, partial / PACKED)
    return record


@contextmanager
def all_or_none(folder: str | Path) -> Iterator[Path]:
    """A folder to write the files of a conversion to, which get their names when all of them are complete.

    Args:
        folder: where to; it is made if it does not exist. Files of an earlier conversion are replaced.

    Raises:
        QsdError: if they cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".conversion-", dir=folder) as name:
            yield Path(name)
            for file in Path(name).iterdir():
                os.replace(file, folder / file.name)
    except OSError as error:
        raise QsdError(f"the conversion cannot be written to {folder}: {error}.") from error


def write_record(record: Record, folder: Path, packed: Path) -> None:
    """Write ``conversion.json`` and ``report.html``.

    Args:
        record: gets the size of the packed file.
        folder: where to.
        packed: the packed file.
    """
    record["sizes"]["file_bytes"] = packed.stat().st_size
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    (folder / PAGE).write_text(html(record), encoding="utf-8")


def summary(record: Mapping[str, Any]) -> Table:
    """The findings of a record as a table for the terminal.

    Args:
        record: what `record_conversion` returned.
    """
    table = Table(title=f"{record['model']['name']} in binary spikes", show_header=False, title_justify="left")
    for finding in findings(record):
        table.add_row(finding.title.rstrip(".:"), finding.text)
    return table


def _check_packed(path: Path, trained: nn.Module, spiking: SpikingNetwork, images: Tensor) -> None:
    loaded = load_packed(path, copy.deepcopy(trained) if spiking.trained.registered is None else None)
    with torch.no_grad():
        same = torch.equal(loaded.to(images.device).simulate(images).logits, spiking.simulate(images).logits)
    if not same:
        raise QsdError("the packed network gives other logits than the one that was packed; nothing was written.")
