"""Train the demonstration, test it, convert it to binary spikes, and say in a short table what came out.

python tools/demo.py
"""

import argparse
import csv
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qsd import QsdError, report
from qsd.cli import main as qsd
from qsd.data import DigitsData
from qsd.tasks import load_task

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "digits.yaml"


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, help="convert on so many test images instead of all")
    parser.add_argument("options", nargs="*", help="further options for fit and test, after --")
    arguments = parser.parse_args(args)
    options = arguments.options
    start = time.perf_counter()
    if code := qsd(["fit", "--config", str(CONFIG), *options]):
        return code
    seconds = time.perf_counter() - start
    folder = _newest_run()
    best = folder / "checkpoints" / "best.ckpt"
    if code := qsd(["test", "--config", str(CONFIG), *options, "--ckpt_path", str(best)]):
        return code
    with (_newest_run() / "metrics.csv").open() as file:
        metrics = list(csv.DictReader(file))[-1]
    # The training has converted and verified on the validation images; now on all that chose nothing, and every one of
    # them in steps too.
    data = DigitsData()
    try:
        record = report.write_conversion(
            load_task(best).model,
            data.whole_part("test"),
            folder / "test",
            report.ConversionOptions(
                max_images=arguments.images,
                step_images=arguments.images or len(data.whole_part("test").dataset),
            ),
            report.Origin("qsd_tiny", str(best), "test images of DigitsData"),
        )
    except QsdError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.print(report.summary(record))
    table = Table("what", "value", title="Handwritten digits, 4-bit weights, T = 4 time steps", title_justify="left")
    table.add_row("test accuracy", f"{100 * float(metrics['test/accuracy']):.2f} %")
    table.add_row("in binary spikes", f"{100 * record.accuracy.spiking:.2f} %")
    for row in record.delays.rows:
        table.add_row(f"stepped, delay {row.delay}", f"{100 * row.accuracy:.2f} %, {row.latency} steps")
    energy = record.energy.total_mj
    table.add_row("energy per image, spiking", f"{1e3 * energy.merged:.3g} µJ ({1e3 * energy.unmerged:.3g} unmerged)")
    table.add_row("energy per image, integer network", f"{1e3 * energy.integer:.3g} µJ")
    table.add_row("packed network", f"{record.sizes.file_bytes / 1e3:.0f} kB")
    table.add_row("training time, with conversion", f"{seconds:.0f} s")
    console.print(table)
    # Outside of the table, which would shorten them.
    print(f"logs: {folder}")
    print(f"checkpoint: {best}")
    print(f"report on validation images: {folder / 'report.html'}")
    print(f"report on test images: {folder / 'test' / 'report.html'}")
    return 0


def _newest_run() -> Path:
    # where the configuration's loggers write, by their next free number
    return max(Path("runs/digits").glob("version_*"), key=lambda folder: int(folder.name.removeprefix("version_")))


if __name__ == "__main__":
    sys.exit(main())
