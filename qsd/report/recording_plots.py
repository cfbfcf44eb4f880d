"""The figure of a recording: its frames, the events of each, and the network's spikes over time."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qsd import plots
from qsd.report.activity_record import ActivityRecord, FrameRecord

_MOST_FRAMES = 12
Pixels = np.ndarray[Any, Any]


def recording_over_time(record: ActivityRecord) -> Figure:
    """Frames above the number of events in each, above the spikes of every stage, on one axis of time.

    Args:
        record: Firing rates and spikes over time for a recording.
    """
    frames, timeline = record.frames or [], record.over_time
    shown = frames[:: -(-len(frames) // _MOST_FRAMES)] if frames else []
    with matplotlib.rc_context(plots.STYLE):
        height = 1.9 + 0.42 * len(timeline)
        figure = Figure(figsize=(plots.WIDTH, height), layout="constrained")
        grid = figure.add_gridspec(2 + len(timeline), 1, height_ratios=[1.6, 1.0, *[0.8] * len(timeline)])
        row = grid[0].subgridspec(1, max(1, len(shown)))
        for number, frame in enumerate(shown):
            axes = figure.add_subplot(row[number])
            axes.imshow(_colours(frame), interpolation="nearest")
            axes.set_axis_off()
        axes = figure.add_subplot(grid[1])
        axes.bar(np.arange(1, len(frames) + 1), [frame.events for frame in frames], width=0.8, color=plots.ORANGE)
        axes.set_xlim(0.5, len(frames) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("events", rotation=0, ha="right", va="center", fontsize=6.5)
        axes.set_xlabel("frame", labelpad=1)
        most = max((max(values, default=0.0) for values in timeline.values()), default=0.0) or 1.0
        for number, (stage, values) in enumerate(timeline.items()):
            axes = figure.add_subplot(grid[2 + number])
            axes.bar(np.arange(1, len(values) + 1), values, width=1.0, color=plots.BLUE)
            axes.set_ylim(0, most * 1.05)
            axes.set_yticks([])
            axes.set_ylabel(stage, rotation=0, ha="right", va="center", fontsize=6.5)
            if number < len(timeline) - 1:
                axes.set_xticks([])
        axes.set_xlabel("time step of the global clock" if timeline else "frame")
    return figure


def _colours(frame: FrameRecord) -> Pixels:
    """A frame as an image, white where nothing changed: brighter events orange, darker ones blue."""
    brighter = np.array(frame.brighter)
    darker = np.array(frame.darker) if frame.darker else np.zeros_like(brighter)
    image = np.ones((*brighter.shape, 3))
    for events, colour in ((brighter, plots.ORANGE), (darker, plots.BLUE)):
        image -= np.sqrt(events)[..., None] * (1 - np.array(to_rgb(colour)))
    return image.clip(0, 1)
