"""The folders that trainings write, and the measurements in them."""

import csv
from pathlib import Path


def newest_run(name: str, folder: str | Path = "runs") -> Path:
    """The folder of the last run of a configuration, by the number that its loggers took.

    Args:
        name: The name of the run's loggers.
        folder: The folder of all runs.
    """
    return max(Path(folder, name).glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))


def last_metrics(run: Path) -> dict[str, str]:
    """The last row of the measurements of a run.

    Args:
        run: The folder of the run.
    """
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))[-1]
