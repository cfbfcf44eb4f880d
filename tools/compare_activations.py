"""Train one configuration with several activations on the same budget, and print the trainings side by side.

python tools/compare_activations.py
python tools/compare_activations.py --config configs/csdformer_cifar10.yaml -- --data.root DIR
"""

import csv
import sys
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

import qsd_launcher
from qsd import program
from qsd.commands.runs import newest_run
from qsd.configurations import find_configuration


def main(args: list[str] | None = None) -> int:
    return program.run("compare_activations", compare, args)


def compare(args: list[str]) -> int:
    """Train and test with each activation.

    Args:
        args: The arguments.

    Returns:
        The exit code.

    Raises:
        QsdError: If the configuration does not exist.
    """
    parser = program.Parser(description=__doc__)
    parser.add_argument("--config", default="configs/csdformer_digits.yaml", help="CSDformer with a CSVLogger first")
    parser.add_argument("--activations", nargs="+", default=["lsq", "qcfs"], help="some of lsq, qcfs, relu")
    parser.add_argument("options", nargs="*", help="further options of qsd fit and qsd test, after --")
    options = parser.parse_args(args)
    config = find_configuration(options.config)
    curves, tests = {}, {}
    for activation in options.activations:
        common = ["--config", str(config), *options.options, "--model.model_args.activation", activation]
        if code := qsd_launcher.main(["fit", *common]):
            return code
        folder = run_folder(config)
        curves[activation] = [100 * float(value) for value in column(folder, "val/accuracy")]
        best = folder / "checkpoints" / "best.ckpt"
        if code := qsd_launcher.main(["test", *common, "--ckpt_path", str(best)]):
            return code
        tests[activation] = 100 * float(column(run_folder(config), "test/accuracy")[-1])
    table = Table("epoch", *curves, title="Validation accuracy in %, and test accuracy of the best checkpoint")
    for epoch, row in enumerate(zip(*curves.values()), 1):
        table.add_row(str(epoch), *(f"{value:.2f}" for value in row))
    table.add_section()
    table.add_row("test", *(f"{value:.2f}" for value in tests.values()))
    Console().print(table)
    return 0


def run_folder(config: Path) -> Path:
    """The folder of the last run of a configuration.

    Args:
        config: The configuration, whose first logger names the folder.
    """
    logger = yaml.safe_load(config.read_text())["trainer"]["logger"][0]["init_args"]
    return newest_run(logger["name"], logger["save_dir"])


def column(folder: Path, name: str) -> list[str]:
    """The values of one measurement in a run, in order.

    Args:
        folder: The folder of the run.
        name: The name of the measurement.
    """
    with (folder / "metrics.csv").open() as file:
        return [row[name] for row in csv.DictReader(file) if row.get(name)]


if __name__ == "__main__":
    sys.exit(main())
