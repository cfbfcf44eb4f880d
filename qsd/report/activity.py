"""Pictures of where and when a network fires for one image, as PNG files and as a page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from qsd import plots
from qsd._version import __version__
from qsd.files import replacing_together
from qsd.report.rendering import PageFigure, render, series
from qsd.spiking.activity import Activity

FILES = ("activity.html", "activity.json", "firing_rates.png", "attention.png", "spikes_over_time.png")
_COLUMNS, _MOST_PANELS = 3, 12
_DPI = 200
Maps = Mapping[str, Tensor]


def write_activity(activity: Activity, image: Tensor, folder: str | Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write the pictures, their numbers and the page that shows them.

    Args:
        activity: Spikes for the image.
        image: The image as the network takes it, ``[C, H, W]``.
        folder: Target folder; it is made if it does not exist. Files of an earlier analysis are replaced.
        facts: ``model``, ``image`` (names of files) and ``time_steps``.

    Returns:
        The files, without those that a network has nothing to show in.
    """
    folder, pictures = Path(folder), _pictures(activity, image)
    with replacing_together(folder) as partial:
        for name, figures in pictures.items():
            for number, figure in enumerate(figures, 1):
                with matplotlib.rc_context(plots.STYLE):
                    figure.savefig(partial / _file_name(name, number), dpi=_DPI, metadata={"Software": None})
        (partial / FILES[1]).write_text(json.dumps(record(activity, facts), indent=1) + "\n", encoding="utf-8")
        (partial / FILES[0]).write_text(activity_html(activity, image, facts), encoding="utf-8")
    names = [_file_name(name, i) for name, figures in pictures.items() for i in range(1, len(figures) + 1)]
    return [folder / name for name in (*FILES[:2], *names)]


def _file_name(name: str, number: int) -> str:
    return f"{name}.png" if number == 1 else f"{name}_{number}.png"


def record(activity: Activity, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the pictures as plain data.

    Args:
        activity: Spikes for the image.
        facts: See `write_activity`.
    """
    maps = {key: getattr(activity, key) for key in ("rates", "responses", "matrices", "received")}
    return {
        "qsd": __version__,
        **facts,
        "latency": activity.latency,
        "over_time": activity.over_time,
        **{key: {name: x.tolist() for name, x in found.items()} for key, found in maps.items()},
    }


def activity_html(activity: Activity, image: Tensor, facts: Mapping[str, Any]) -> str:
    """The page.

    Args:
        activity: Spikes for the image.
        image: See `write_activity`.
        facts: See `write_activity`.
    """
    drawn = _pictures(activity, image)
    figures = {name: _page_figures(name, found, activity) for name, found in drawn.items()}
    return render("activity.html.j2", figures_of=figures, latency=activity.latency, version=__version__, **facts)


def _page_figures(name: str, figures: Sequence[Figure], activity: Activity) -> list[PageFigure]:
    means = ", ".join(f"{stage} {float(x.mean()):.3f}" for stage, x in activity.rates.items())
    words = {
        "firing_rates": (
            f"Firing rates over the image by stage; means: {means}",
            "Spikes per neuron and time step at each position, mean over the channels and neurons of a stage.",
        ),
        "attention": (
            f"Attention over the image in {len(activity.received) + len(activity.responses)} layers",
            "Attention that each token receives (mean of the matrix over heads and queries), or, where there is no "
            "matrix, the firing rate of each token's response. Each panel has its own scale.",
        ),
        "matrices": (
            f"Matrices of attention in {len(activity.matrices)} layers",
            "Matrix of attention, queries by keys, mean over heads as share of T.",
        ),
        "spikes_over_time": (
            f"Spikes over {activity.latency} time steps in {len(activity.over_time)} stages",
            "Spikes per neuron of each stage in each time step of the global clock.",
        ),
    }
    return series(figures, *words[name])


def _pictures(activity: Activity, image: Tensor) -> dict[str, list[Figure]]:
    pixels = _pixels(image)
    received = {**activity.received, **activity.responses}
    found = {
        "firing_rates": overlays(activity.rates, pixels, "spikes per neuron and step", shared=True),
        "attention": overlays(received, pixels, "attention"),
        "matrices": _matrices(activity.matrices),
        "spikes_over_time": [over_time(activity.over_time)] if activity.over_time else [],
    }
    return {name: figures for name, figures in found.items() if figures}


def _pixels(image: Tensor) -> np.ndarray[Any, Any]:
    """The image in grey, from 0 to 1, ``[H, W]``: colours would mix with those of the maps."""
    grey = image.double().mean(0).cpu().numpy()
    low, high = float(grey.min()), float(grey.max())
    return (grey - low) / (high - low) if high > low else np.zeros_like(grey)


def overlays(maps: Maps, pixels: np.ndarray[Any, Any], label: str, shared: bool = False) -> list[Figure]:
    """Maps laid over the image, several to a figure.

    Args:
        maps: Values by name, ``[H, W]`` of any size.
        pixels: The image, ``[H, W]`` from 0 to 1.
        label: Name of the values with their unit.
        shared: Whether all maps have one scale.
    """
    height, width = pixels.shape
    most = max((float(x.max()) for x in maps.values()), default=0.0)

    def draw(axes: Axes, values: Tensor) -> Any:
        top = (most if shared else float(values.max())) or 1.0
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
        # The image shows through, also where nothing fires.
        return axes.imshow(
            values.cpu().numpy(), cmap="magma", vmin=0, vmax=top, alpha=0.65, extent=(0, width, height, 0),
            interpolation="nearest",
        )  # fmt: skip

    return [_grid(chunk, draw, label if shared else "") for chunk in _chunks(maps)]


def _matrices(maps: Maps) -> list[Figure]:
    return [
        _grid(chunk, lambda axes, x: axes.imshow(x.cpu().numpy(), cmap="magma", vmin=0), "") for chunk in _chunks(maps)
    ]


def _chunks(maps: Maps) -> list[dict[str, Tensor]]:
    names = list(maps)
    return [{name: maps[name] for name in names[i : i + _MOST_PANELS]} for i in range(0, len(names), _MOST_PANELS)]


def _grid(maps: Maps, draw: Any, label: str) -> Figure:
    """Panels in rows, each with the name and the mean of its map."""
    rows = -(-len(maps) // _COLUMNS)
    columns = min(_COLUMNS, len(maps))
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 0.25 + 1.62 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        drawn = None
        for axes, (name, values) in zip(panels, maps.items()):
            drawn = draw(axes, values)
            axes.set_title(f"{name.removesuffix('.attn')}\nmean {float(values.mean()):.3f}", fontsize=6.5, pad=2)
        for axes in panels:
            axes.set_axis_off()
        if label and drawn is not None:
            figure.colorbar(drawn, ax=panels.tolist(), label=label, shrink=0.8, aspect=30, location="bottom")
    return figure


def over_time(timeline: Mapping[str, Sequence[float]]) -> Figure:
    """Spikes per neuron over the time steps of the global clock, a row for each stage.

    Args:
        timeline: By stage, one number for each time step.
    """
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 0.7 + 0.42 * len(timeline)), layout="constrained")
        panels = figure.subplots(len(timeline), 1, sharex=True, squeeze=False)[:, 0]
        most = max((max(values, default=0.0) for values in timeline.values()), default=0.0) or 1.0
        for axes, (stage, values) in zip(panels, timeline.items()):
            axes.bar(np.arange(1, len(values) + 1), values, width=1.0, color=plots.BLUE)
            axes.set_ylim(0, most * 1.05)
            axes.set_yticks([])
            axes.set_ylabel(stage, rotation=0, ha="right", va="center", fontsize=6.5)
        panels[-1].set_xlabel("time step of the global clock")
        panels[0].set_title(f"spikes per neuron, each row from 0 to {most:.2g}", fontsize=7, pad=3)
    return figure
