"""Train the demonstration, test it, and say in a short table what came out and where it lies.

python tools/demo.py
"""

import argparse
import csv
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qsd.cli import main as qsd

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "digits.yaml"


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("options", nargs="*", help="further options for fit and test, after --")
    options = parser.parse_args(args).options
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
    table = Table("what", "value", title="Handwritten digits, 4-bit weights, T = 4 time steps")
    table.add_row("test accuracy", f"{100 * float(metrics['test/accuracy']):.2f} %")
    table.add_row("test loss", f"{float(metrics['test/loss']):.4f}")
    table.add_row("training time", f"{seconds:.0f} s")
    table.add_row("logs", str(folder))
    table.add_row("checkpoint", str(best))
    Console().print(table)
    return 0


def _newest_run() -> Path:
    # where the configuration's loggers write, by their next free number
    return max(Path("runs/digits").glob("version_*"), key=lambda folder: int(folder.name.removeprefix("version_")))


if __name__ == "__main__":
    sys.exit(main())
