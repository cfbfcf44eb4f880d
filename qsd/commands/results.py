"""Keep the files of finished runs side by side, and make tables of results from them.

Of a training, the record of the run, its configuration, measurements, conversion and report are kept; of a test, its
record; of a later conversion (qsd convert), its record and report in place of the training's. A training that was
resumed has several runs, which are named in their order. Tables hold what the files say, and nothing else.

Examples:
  qsd results --keep digits runs/digits/version_0 runs/digits/version_1
  qsd results
  qsd results --page docs/results.md
"""

import csv
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qsd import program
from qsd.errors import QsdError
from qsd.files import replace_content, replacing_together
from qsd.report.files import PAGE, RECORD
from qsd.report.record import Record
from qsd.runs.record import FILE, RunRecord

_ENTRY, _TEST, _MEASUREMENTS, _CONFIGURATION = "entry.json", "test.json", "metrics.csv", "config.yaml"
_COLUMNS = (
    "recipe", "network", "T", "bits", "test accuracy in %", "last validation in %", "parameters", "packed kB",
    "µJ, merged", "µJ, not merged", "epochs", "hours", "hardware", "seed", "versions", "files",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """The files of one recipe.

    Attributes:
        folder: Where they are kept.
        title: What the recipe is, in words.
        table: Name of the table that it belongs to.
        fit: Record of the training.
        test: Record of the test, if there was one.
        conversion: Record of the conversion, if there was one.
    """

    folder: Path
    title: str
    table: str
    fit: RunRecord
    test: RunRecord | None
    conversion: Record | None


def main(args: Sequence[str] | None = None) -> int:
    """Run ``qsd results``.

    Args:
        args: The arguments; ``None`` for those of the process.

    Returns:
        The exit code, as of `qsd.program.run`.
    """
    return program.run("qsd", _command, args)


def _command(args: list[str]) -> None:
    parser = program.Parser(prog="qsd results", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs, with --keep")
    parser.add_argument("--keep", metavar="NAME", help="keep the files of these runs under this name")
    parser.add_argument("--title", help="what the recipe is, for the table; the default is NAME")
    parser.add_argument("--table", default="results", help="name of the table that it belongs to")
    parser.add_argument("--folder", type=Path, default=Path("docs/results"), help="where the files are kept")
    parser.add_argument("--page", type=Path, help="page whose tables, between <!-- results NAME --> and "
                        "<!-- end -->, are made anew")  # fmt: skip
    options = parser.parse_args(args)
    if options.keep is not None:
        keep(options.runs, options.folder / options.keep, options.title or options.keep, options.table)
    elif options.runs:
        raise QsdError("the runs need a name to be kept under: --keep NAME.")
    entries = read_entries(options.folder)
    if options.page is not None:
        fill(options.page, entries)
    else:
        for table in sorted({entry.table for entry in entries}):
            print(f"{table}\n\n{markdown([e for e in entries if e.table == table], options.folder)}\n")


def keep(runs: Sequence[Path], folder: Path, title: str, table: str) -> None:
    """Copy what a results page needs of the runs of one recipe.

    Args:
        runs: Folders of the stretches of a training, in their order, of its test, and of a conversion.
        folder: The folder to write.
        title: What the recipe is, in words.
        table: Name of the table that it belongs to.

    Raises:
        QsdError: If no run is a finished training, or a run is of another network.
    """
    records = {run: RunRecord.read(run / FILE) for run in runs if (run / FILE).is_file()}
    stretches = [run for run in runs if run not in records or records[run].stage == "fit"]
    finished = [run for run in stretches if run in records]
    if not finished:
        raise QsdError(f"no run is a finished training: none has a {FILE} of qsd fit.")
    last = finished[-1]
    # A folder of qsd convert has a record, and no configuration.
    converted = next(
        (r for r in stretches[::-1] if (r / RECORD).is_file() and not (r / _CONFIGURATION).is_file()), last
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_together(folder) as partial:
        for name, run in ((FILE, last), (_CONFIGURATION, last), (RECORD, converted), (PAGE, converted)):
            if (run / name).is_file():
                shutil.copyfile(run / name, partial / name)
        for run, record in records.items():
            if record.stage == "test":
                if (record.model, record.parameters) != (records[last].model, records[last].parameters):
                    raise QsdError(f"the test {run} is of another network, {record.model}; name one of this training.")
                shutil.copyfile(run / FILE, partial / _TEST)
        _join([run / _MEASUREMENTS for run in stretches if (run / _MEASUREMENTS).is_file()], partial / _MEASUREMENTS)
        (partial / _ENTRY).write_text(json.dumps({"title": title, "table": table}) + "\n", encoding="utf-8")


def _join(measurements: Sequence[Path], target: Path) -> None:
    """Write the rows of several tables, whose columns may differ, as one."""
    rows = []
    for path in measurements:
        with path.open(newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def read_entries(folder: Path) -> list[Entry]:
    """All recipes whose files are kept in a folder, in the order of their names.

    Args:
        folder: The folder.
    """
    found = []
    for path in sorted(folder.glob(f"*/{_ENTRY}")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            title, table = str(content["title"]), str(content["table"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise QsdError(f"{path} is damaged; keep the runs again with qsd results --keep.") from error
        kept = path.parent
        test = RunRecord.read(kept / _TEST) if (kept / _TEST).is_file() else None
        conversion = Record.read(kept / RECORD) if (kept / RECORD).is_file() else None
        found.append(Entry(kept, title, table, RunRecord.read(kept / FILE), test, conversion))
    return found


def fill(page: Path, entries: Sequence[Entry]) -> None:
    """Replace the tables of a page.

    Args:
        page: The page, in Markdown.
        entries: All recipes.

    Raises:
        QsdError: If the page has no place for a table.
    """
    text = page.read_text(encoding="utf-8")
    for table in sorted({entry.table for entry in entries}):
        start, end = f"<!-- results {table} -->", "<!-- end -->"
        place = re.compile(f"{re.escape(start)}.*?{end}", re.DOTALL)
        found = place.search(text)
        if found is None:
            raise QsdError(f"{page} has no place for the table {table}; write {start} and {end} into it.")
        content = markdown([entry for entry in entries if entry.table == table], page.parent)
        text = f"{text[: found.start()]}{start}\n{content}\n{end}{text[found.end() :]}"
    replace_content(page, text.encode())


def markdown(entries: Sequence[Entry], base: Path) -> str:
    """A table of results in Markdown.

    Args:
        entries: Its rows.
        base: The folder of the page, which links start from.
    """
    rows = [_COLUMNS, tuple("---" for _ in _COLUMNS), *(_row(entry, base) for entry in entries)]
    filled = [index for index in range(len(_COLUMNS)) if any(row[index] for row in rows[2:])]
    return "\n".join(f"| {' | '.join(row[index] for index in filled)} |" for row in rows)


def _row(entry: Entry, base: Path) -> tuple[str, ...]:
    fit, conversion = entry.fit, entry.conversion
    energy = None if conversion is None or conversion.energy is None else conversion.energy.total_mj
    packed = None if conversion is None else conversion.sizes.file_bytes or conversion.sizes.packed_bytes
    bits = fit.model_args.get("weight_bits")
    time_steps = fit.model_args.get("time_steps") or (conversion.model.time_steps if conversion is not None else "")
    if fit.model.partition(".")[0].endswith("_ann"):  # The float twin has none, whatever a recipe says.
        bits, time_steps = 0, "–"
    versions = ", ".join(f"{name} {fit.versions[name]}" for name in ("qsd", "torch") if name in fit.versions)
    return (
        entry.title,
        f"`{fit.model}`",
        str(time_steps),
        "" if bits is None else str(bits or 32),
        _accuracy(entry.test),
        _percent(_metric(fit, "val/accuracy")),
        f"{fit.parameters / 1e6:.2f} M",
        "" if packed is None else f"{packed / 1e3:,.0f}",
        "" if energy is None else f"{1e3 * energy.merged:.3g}",
        "" if energy is None else f"{1e3 * energy.unmerged:.3g}",
        str(fit.epochs),
        f"{fit.seconds / 3600:.2f}",
        fit.hardware,
        "" if fit.seed is None else str(fit.seed),
        versions,
        _links(entry.folder, base),
    )


def _metric(record: RunRecord, name: str) -> float | None:
    return record.metrics.get(name)


def _accuracy(test: RunRecord | None) -> str:
    """Test accuracy with its binomial deviation."""
    if test is None or (accuracy := _metric(test, "test/accuracy")) is None:
        return ""
    count = test.images.get("test", 0)
    deviation = f" ± {100 * math.sqrt(accuracy * (1 - accuracy) / count):.2f}" if count else ""
    return f"{100 * accuracy:.2f}{deviation}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _links(folder: Path, base: Path) -> str:
    names = {_MEASUREMENTS: "log", _CONFIGURATION: "configuration", RECORD: "record", PAGE: "report"}
    where = folder.resolve().relative_to(base.resolve()) if folder.resolve().is_relative_to(base.resolve()) else folder
    return ", ".join(
        f"[{word}]({where.as_posix()}/{name})" for name, word in names.items() if (folder / name).is_file()
    )
