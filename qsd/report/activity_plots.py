"""Figures of where and when a network fires for one image."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qsd import plots
from qsd.report.activity_record import ActivityRecord
from qsd.report.recording_plots import recording_over_time
from qsd.report.rendering import PageFigure, series

_COLUMNS, _MOST_PANELS = 3, 12
Pixels = np.ndarray[Any, Any]
Maps = Mapping[str, Pixels]


def figures(record: ActivityRecord) -> dict[str, list[Figure]]:
    """The figures by name, without those that have nothing to show.

    Args:
        record: Firing rates, attention and spikes over time.
    """
    pixels = np.array(record.image)
    rates, attention, matrices = (
        {name: np.array(x) for name, x in maps.items()}
        for maps in (record.rates, {**record.received, **record.responses}, record.matrices)
    )
    found = {
        "firing_rates": overlays(rates, pixels, "spikes per neuron and time step"),
        "attention": overlays(attention, pixels),
        "matrices": [
            _grid(chunk, lambda axes, x: axes.imshow(x, cmap="magma", vmin=0), "") for chunk in _chunks(matrices)
        ],
        "spikes_over_time": [over_time(record.over_time)] if record.over_time else [],
        "recording": [recording_over_time(record)] if record.frames else [],
    }
    return {name: drawn for name, drawn in found.items() if drawn}


def page_figures(record: ActivityRecord, drawn: Mapping[str, Sequence[Figure]]) -> dict[str, list[PageFigure]]:
    """The figures as a page shows them.

    Args:
        record: What they show.
        drawn: The figures.
    """
    means = ", ".join(f"{stage} {np.mean(x):.3f}" for stage, x in record.rates.items())
    words = {
        "firing_rates": (
            f"Firing rates over the image by stage; means: {means}",
            "Spikes per neuron and time step at each position, mean over the channels and neurons of a stage. "
            "Measured on one of the images.",
        ),
        "attention": (
            f"Attention over the image, by token, in {len(record.received) + len(record.responses)} layers",
            "Attention that each token receives (mean of the matrix over heads and queries), or, where there is no "
            "matrix, the firing rate of each token's response. Each panel has its own scale. "
            "Measured on one of the images.",
        ),
        "matrices": (
            f"Matrices of attention, queries by keys, in {len(record.matrices)} layers",
            "Matrix of attention, queries by keys, mean over heads as share of T. Measured on one of the images.",
        ),
        "spikes_over_time": (
            f"Spikes per neuron over {record.latency} time steps in {len(record.over_time)} stages",
            "Spikes per neuron of each stage in each time step of the global clock. Measured on one of the images.",
        ),
        "recording": (
            f"Frames of a recording with {', '.join(f'{f.events:.0f}' for f in record.frames or ())} events, and the "
            f"spikes of {len(record.over_time)} stages over {record.latency} time steps",
            "A recording of an event camera: its frames (brighter events in orange, darker ones in blue), the events "
            "of each frame, and the spikes of the network, whose frames follow one another on one clock.",
        ),
    }
    return {name: series(found, *words[name]) for name, found in drawn.items()}


def overlays(maps: Maps, pixels: Pixels, label: str = "") -> list[Figure]:
    """Maps laid over the image, several to a figure.

    Args:
        maps: Values by name, ``[H, W]`` of any size.
        pixels: The image, ``[H, W]`` from 0 to 1.
        label: Name of the values with their unit, for one scale of all maps; empty for a scale of each.
    """
    height, width = pixels.shape
    most = max((float(x.max()) for x in maps.values()), default=0.0)

    def draw(axes: Axes, values: Pixels) -> Any:
        top = (most if label else float(values.max())) or 1.0
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
        return axes.imshow(
            values, cmap="magma", vmin=0, vmax=top, alpha=0.65, extent=(0, width, height, 0), interpolation="nearest"
        )

    return [_grid(chunk, draw, label) for chunk in _chunks(maps)]


def _chunks(maps: Maps) -> list[dict[str, Pixels]]:
    names = list(maps)
    return [{name: maps[name] for name in names[i : i + _MOST_PANELS]} for i in range(0, len(names), _MOST_PANELS)]


def _grid(maps: Maps, draw: Callable[[Axes, Pixels], Any], label: str) -> Figure:
    """Panels in rows, each with the name and the mean of its map."""
    columns = min(_COLUMNS, len(maps))
    rows = -(-len(maps) // columns)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 0.25 + 1.65 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        drawn = None
        for axes, (name, values) in zip(panels, maps.items()):
            drawn = draw(axes, values)
            axes.set_title(f"{name.removesuffix('.attn')}\nmean {values.mean():.3f}", fontsize=6.5, pad=2)
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
