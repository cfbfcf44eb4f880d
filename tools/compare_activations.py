"""Train one configuration with several activations on the same budget, and show the trainings side by side.

python tools/compare_activations.py
python tools/compare_activations.py --config configs/csdformer_cifar10.yaml -- --data.root DIR
"""

import argparse
import csv
import sys
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from qsd.cli import main as qsd

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "csdformer_digits.yaml"


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, help="of a CSDformer, with a CSVLogger first")
    parser.add_argument("--activations", nargs="+", default=["lsq", "qcfs"], help="of: lsq, qcfs, relu")
    parser.add_argument("options", nargs="*", help="further options for fit and test, after --")
    options = parser.parse_args(args)
    if not options.config.is_file():
        print(f"compare_activations: error: configuration {options.config} does not exist.", file=sys.stderr)
        return 2
    curves, tests = {}, {}
    for activation in options.activations:
        common = ["--config", str(options.config), *options.options, "--model.model_args.activation", activation]
        if code := qsd(["fit", *common]):
            return code
        folder = _newest_run(options.config)
        curves[activation] = [100 * float(value) for value in _column(folder, "val/accuracy")]
        best = folder / "checkpoints" / "best.ckpt"
        if code := qsd(["test", *common, "--ckpt_path", str(best)]):
            return code
        tests[activation] = 100 * float(_column(_newest_run(options.config), "test/accuracy")[-1])
    table = Table("epoch", *curves, title="Validation accuracy in %, and test accuracy of the best checkpoint")
    for epoch, row in enumerate(zip(*curves.values()), 1):
        table.add_row(str(epoch), *(f"{value:.2f}" for value in row))
    table.add_section()
    table.add_row("test", *(f"{value:.2f}" for value in tests.values()))
    Console().print(table)
    return 0


def _newest_run(config: Path) -> Path:
    # where the configuration's loggers write, by their next free number
    logger = yaml.safe_load(config.read_text())["trainer"]["logger"][0]["init_args"]
    runs = Path(logger["save_dir"], logger["name"]).glob("version_*")
    return max(runs, key=lambda folder: int(folder.name.removeprefix("version_")))


def _column(folder: Path, name: str) -> list[str]:
    with (folder / "metrics.csv").open() as file:
        return [row[name] for row in csv.DictReader(file) if row.get(name)]


if __name__ == "__main__":
    sys.exit(main())
