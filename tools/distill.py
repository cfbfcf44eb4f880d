"""Train a teacher, then a student with its help; test both and print the results.

python tools/distill.py
python tools/distill.py imagenet --data.root DIR
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import qsd_launcher
from qsd import program
from qsd.commands.runs import last_metrics, newest_run
from qsd.configurations import find_configuration


def main(args: list[str] | None = None) -> int:
    return program.run("distill", distill, args)


def distill(args: list[str]) -> int:
    """Train and test teacher and student.

    Args:
        args: The arguments.

    Returns:
        The exit code.

    Raises:
        QsdError: If a configuration does not exist.
    """
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
    base, *overlays = (find_configuration(f"configs/{name}{suffix}.yaml") for suffix in ("", "_teacher", "_distill"))
    table = Table("network", "test accuracy", title=f"Distillation, configs/{name}_distill.yaml", title_justify="left")
    table.add_column("checkpoint", overflow="fold")
    teacher = chosen.teacher
    for overlay, role in zip(overlays, ("teacher", "student")):
        if role == "student" or teacher is None:
            fit = ["fit", "--config", str(base), "--config", str(overlay), *options]
            if role == "student":
                fit += ["--trainer.callbacks.init_args.teacher", str(teacher)]
            if code := qsd_launcher.main(fit):
                return code
            checkpoint = newest_run(overlay.stem) / "checkpoints" / "best.ckpt"
        else:
            checkpoint = Path(teacher)
        teacher = teacher or checkpoint
        evaluation = ["--config", str(base), *without_fitting(options), "--ckpt_path", str(checkpoint)]
        if code := qsd_launcher.main(["test", *evaluation]):
            return code
        accuracy = float(last_metrics(newest_run(name))["test/accuracy"])
        table.add_row(role, f"{100 * accuracy:.2f} %", str(checkpoint))
    Console().print(table)
    return 0


def without_fitting(options: list[str]) -> list[str]:
    """The options for testing, without those of the model, which the checkpoint holds.

    Args:
        options: The options of a training.
    """
    kept, drop = [], False
    for option in options:
        if option.startswith("--"):
            drop = option.startswith("--model.")
        if not drop:
            kept.append(option)
    return kept


if __name__ == "__main__":
    sys.exit(main())
