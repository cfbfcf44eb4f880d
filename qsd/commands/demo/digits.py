"""The demonstration of a classifier: training, test, conversion and report."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

import qsd_launcher
from qsd import report
from qsd.commands.runs import last_metrics, newest_run
from qsd.data import DigitEvents, DigitsData, ImageData
from qsd.packing import image_notes
from qsd.report.record import ClassifierAccuracy
from qsd.tasks import load_task

# By kind the configuration, which is also the name of the runs, and the title of the table.
_KINDS: dict[str, tuple[str, type[ImageData], str]] = {
    "digits": ("digits", DigitsData, "Handwritten digits"),
    "events": ("digit_events", DigitEvents, "Digits in front of an event camera"),
}


def run(kind: str, max_images: int | None, options: Sequence[str]) -> int:
    """Train, test and convert, and print a table of the results.

    The training converts the network on the validation images. Here it is converted again on the test images, which
    chose nothing. As in other conversions, 100 of the images are also stepped.

    Args:
        kind: ``"digits"`` or ``"events"``.
        max_images: The number of test images to convert on; ``None`` for all.
        options: Further options of ``qsd fit`` and ``qsd test``.

    Returns:
        The exit code.
    """
    name, kind_of_data, title = _KINDS[kind]
    config = ["--config", f"configs/{name}.yaml"]
    start = time.perf_counter()
    if code := qsd_launcher.main(["fit", *config, *options]):
        return code
    seconds = time.perf_counter() - start
    folder = newest_run(name)
    best = folder / "checkpoints" / "best.ckpt"
    if code := qsd_launcher.main(["test", *config, *options, "--ckpt_path", str(best)]):
        return code
    accuracy = float(last_metrics(newest_run(name))["test/accuracy"])
    data: Any = kind_of_data()  # type: ignore[call-arg]
    images = data.whole_part("test")
    task = load_task(best)
    record = report.write_conversion(
        task.model,
        images,
        folder / "test",
        report.ConversionOptions(max_images=max_images),
        report.Origin(task.hparams["model"], str(best), f"test images of {kind_of_data.__name__}"),
        image_notes(data),
    )
    console = Console()
    console.print(report.summary(record))
    console.print(_table(record, accuracy, seconds, title))
    # Outside the table, which would shorten the paths.
    print(f"logs: {folder}")
    print(f"checkpoint: {best}")
    print(f"report on validation images: {folder / 'report.html'}")
    print(f"report on test images: {folder / 'test' / 'report.html'}")
    return 0


def _table(record: report.Record, accuracy: float, seconds: float, title: str) -> Table:
    """The results in rows; a complete record of a classifier holds all of them."""
    assert isinstance(record.accuracy, ClassifierAccuracy)
    assert record.delays is not None
    assert record.energy is not None
    title = f"{title}, 4-bit weights, T = 4 time steps"
    table = Table("result", "value", title=title, title_justify="left")
    table.add_row("test accuracy", f"{100 * accuracy:.2f} %")
    table.add_row("test accuracy in binary spikes", f"{100 * record.accuracy.spiking:.2f} %")
    for row in record.delays.rows:
        name = f"stepped, delay {row.delay} ({record.delays.images} images)"
        table.add_row(name, f"{100 * row.accuracy:.2f} %, {row.latency} steps")
    energy = record.energy.total_mj
    table.add_row("energy per image, spiking", f"{1e3 * energy.merged:.3g} µJ ({1e3 * energy.unmerged:.3g} unmerged)")
    table.add_row("energy per image, integer network", f"{1e3 * energy.integer:.3g} µJ")
    table.add_row("packed network", f"{(record.sizes.file_bytes or 0) / 1e3:.0f} kB")
    table.add_row("training time, with conversion", f"{seconds:.0f} s")
    return table
