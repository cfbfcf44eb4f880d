"""Train a teacher, then a student that it teaches; test both and say what came out.

python tools/distill.py
python tools/distill.py imagenet --data.root DIR
"""

import argparse
import csv
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qsd.cli import main as qsd

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        usage="distill.py [NAME] [--teacher CHECKPOINT] [options of qsd fit]",
        description=f"{__doc__.splitlines()[0]} NAME, such as digits or imagenet, is that of configs/NAME.yaml, "
        "NAME_teacher.yaml and NAME_distill.yaml.",
        epilog="Further options, such as --data.root or --trainer.max_epochs, go to both trainings and tests.",
        allow_abbrev=False,
    )
    parser.add_argument("--teacher", metavar="CHECKPOINT", help="a trained teacher: only the student is trained")
    chosen, options = parser.parse_known_args(args)
    name = options.pop(0) if options and not options[0].startswith("-") else "digits"
    base, *overlays = (CONFIGS / f"{name}{suffix}.yaml" for suffix in ("", "_teacher", "_distill"))
    for path in (base, *overlays):
        if not path.is_file():
            print(f"distill: error: there is no {path.relative_to(CONFIGS.parent)}.", file=sys.stderr)
            return 2
    table = Table("network", "test accuracy", title=f"Distillation, configs/{name}_distill.yaml", title_justify="left")
    table.add_column("checkpoint", overflow="fold")
    teacher = chosen.teacher
    for overlay, role in zip(overlays, ("teacher", "student")):
        if role == "student" or teacher is None:
            fit = ["fit", "--config", str(base), "--config", str(overlay), *options]
            if role == "student":
                fit += ["--trainer.callbacks.init_args.teacher", str(teacher)]
            if code := qsd(fit):
                return code
            checkpoint = newest_run(overlay.stem) / "checkpoints" / "best.ckpt"
        else:
            checkpoint = Path(teacher)
        teacher = teacher or checkpoint
        if code := qsd(["test", "--config", str(base), *without_fitting(options), "--ckpt_path", str(checkpoint)]):
            return code
        with (newest_run(name) / "metrics.csv").open() as file:
            metrics = list(csv.DictReader(file))[-1]
        table.add_row(role, f"{100 * float(metrics['test/accuracy']):.2f} %", str(checkpoint))
    Console().print(table)
    return 0


def newest_run(name: str) -> Path:
    """The folder of a configuration's last run, by the free number that its loggers took."""
    return max(Path("runs", name).glob("version_*"), key=lambda folder: int(folder.name.removeprefix("version_")))


def without_fitting(options: list[str]) -> list[str]:
    """Options for testing: without those of the model, which is the checkpoint's."""
    kept, drop = [], False
    for option in options:
        if option.startswith("--"):
            drop = option.startswith("--model.")
        if not drop:
            kept.append(option)
    return kept


if __name__ == "__main__":
    sys.exit(main())
