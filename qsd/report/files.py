"""The three files of a conversion: packed network, record and page."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from qsd.energy import energy_csv
from qsd.files import replacing
from qsd.report.findings import findings
from qsd.report.page import html
from qsd.report.record import Record

PACKED, RECORD, PAGE = FILES = ("spiking.safetensors", "conversion.json", "report.html")


def write_record(record: Record, folder: Path, packed: Path) -> Record:
    """Write ``conversion.json`` and ``report.html``.

    Args:
        record: What was measured.
        folder: Target folder.
        packed: The packed file.

    Returns:
        The record as it was written, with the size of the packed file.
    """
    sizes = record.sizes.model_copy(update={"file_bytes": packed.stat().st_size})
    record = record.model_copy(update={"sizes": sizes})
    (folder / RECORD).write_text(record.to_json(), encoding="utf-8")
    (folder / PAGE).write_text(html(record), encoding="utf-8")
    return record


def summary(record: Record) -> Table:
    """The findings of a record as a table for the terminal.

    Args:
        record: What was measured.
    """
    table = Table(title=f"{escape(record.model.name)} in binary spikes", show_header=False, title_justify="left")
    for finding in findings(record):
        table.add_row(escape(finding.title.rstrip(".:")), escape(finding.text))
    return table


def write_csv(record: Record, path: str | Path) -> None:
    """Write the operations, bits and energies by layer as CSV.

    Args:
        record: What was measured, the energy included.
        path: The file; one that exists is replaced.
    """
    assert record.energy is not None
    text = energy_csv(record.energy.model_dump()["layers"], record.energy.network)
    with replacing(path) as partial:
        Path(partial).write_text(text, encoding="utf-8")
