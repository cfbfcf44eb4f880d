"""Pictures of where and when a network fires for one image, as PNG files and as a page."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor

from qsd import plots
from qsd._version import __version__
from qsd.files import replacing_together
from qsd.report.activity_plots import figures, page_figures
from qsd.report.activity_record import ActivityRecord, activity_record
from qsd.report.rendering import render
from qsd.spiking.activity import Activity

FILES = ("activity.html", "activity.json", "firing_rates.png", "attention.png", "spikes_over_time.png")
_DPI = 200


def write_activity(activity: Activity, image: Tensor, folder: str | Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write the pictures, their numbers and the page that shows them.

    Args:
        activity: Spikes for the image.
        image: The image as the network takes it, ``[C, H, W]``.
        folder: Target folder; it is made if it does not exist. Files of an earlier analysis are replaced.
        facts: ``model``, ``image`` (names of files) and ``time_steps``.

    Returns:
        The files: the page, its numbers, and the pictures that there is something to show in.
    """
    record = activity_record(activity, image, matrices=True)
    pictures = {
        f"{name}.png" if number == 1 else f"{name}_{number}.png": figure
        for name, drawn in figures(record).items()
        for number, figure in enumerate(drawn, 1)
    }
    with replacing_together(folder) as partial:
        for name, figure in pictures.items():
            with matplotlib.rc_context(plots.STYLE):
                figure.savefig(partial / name, dpi=_DPI, metadata={"Software": None})
        numbers = {"qsd": __version__, **facts, **record.model_dump()}
        (partial / FILES[1]).write_text(json.dumps(numbers) + "\n", encoding="utf-8")
        (partial / FILES[0]).write_text(activity_html(record, facts), encoding="utf-8")
    return [Path(folder, name) for name in (*FILES[:2], *pictures)]


def activity_html(record: ActivityRecord, facts: Mapping[str, Any]) -> str:
    """The page.

    Args:
        record: Firing rates, attention and spikes over time.
        facts: See `write_activity`.
    """
    plotted = page_figures(record, figures(record))
    return render("activity.html.j2", plots=plotted, latency=record.latency, version=__version__, **facts)
