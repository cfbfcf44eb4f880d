"""Figures of a conversion record, for its report and for papers.

Every function takes plain data, as `qsd.report` records them, and returns figures of matplotlib, without a backend and
without global state. Figures have the width of a phone's screen, so that their text stays legible there. If the layers
of a network need more rows than a printed page has, they are spread over several figures. The colours are those of
Okabe and Ito, and the map cividis: colour-blind readers can tell them apart, and they differ in grey.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

WIDTH = 4.2  # Inches, about 400 pixels on a screen.
_ROW = 0.165  # Inches for the row of a layer.
_MOST_ROWS = 46  # Rows that fit on a printed page.
STYLE: Any = {
    "font.size": 8,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "qsd",  # The same record gives the same file.
}
BLUE, ORANGE, GREEN, PURPLE, GREY, BLACK = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#8c8c8c", "#222222"

# The columns of an energy measurement: key, name in print, colour.
ENERGY_COLUMNS = (
    ("merged", "spiking, merged", BLUE),
    ("unmerged", "spiking, unmerged", GREEN),
    ("papers", "papers' formula", GREY),
    ("integer", "integer network", ORANGE),
)


def data_uri(figure: Figure) -> str:
    """A figure as the ``data:`` address of an SVG image, in which text is drawn as paths.

    Args:
        figure: Any figure.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def firing_rates(neurons: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Bars of the firing rate of every neuron layer, in spikes per neuron and time step.

    Args:
        neurons: Records with ``name`` and ``rate``, in the network's order.
    """
    most = max((neuron["rate"] for neuron in neurons), default=0.0)

    def draw(axes: Axes, chunk: Sequence[Mapping[str, Any]], rows: np.ndarray[Any, Any]) -> None:
        rates = np.array([neuron["rate"] for neuron in chunk])
        axes.barh(rows, rates, height=0.72, color=BLUE)
        for row, rate in zip(rows.tolist(), rates.tolist()):
            axes.text(rate + most * 0.015, row, f"{rate:.3f}", va="center", fontsize=6)
        axes.set_xlim(0, most * 1.18 or 1)
        axes.set_xlabel("spikes per neuron and time step")

    return [layer_figure(chunk, [draw]) for chunk in chunks(neurons)]


def count_histograms(neurons: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Stacked bars of the shares of neurons with spike counts 1, 2, ... T per image, by layer.

    The share that is missing to 1 fires no spike.

    Args:
        neurons: Records with ``name`` and ``histogram``, the shares of the spike counts 0 to T.
    """
    most = max((1 - neuron["histogram"][0] for neuron in neurons), default=1.0)

    def draw(axes: Axes, chunk: Sequence[Mapping[str, Any]], rows: np.ndarray[Any, Any]) -> None:
        shares = np.array([neuron["histogram"] for neuron in chunk])
        steps = shares.shape[1] - 1
        colours = matplotlib.colormaps["cividis"](np.linspace(0.9, 0.05, steps) if steps > 1 else [0.3])
        left = np.zeros(len(rows))
        for count in range(1, steps + 1):
            axes.barh(rows, shares[:, count], left=left, height=0.78, color=colours[count - 1], label=str(count))
            left += shares[:, count]
        axes.set_xlim(0, most * 1.03 or 1)
        axes.set_xlabel("share of neurons")
        axes.legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=min(steps, 8), fontsize=6.5, columnspacing=1,
            handlelength=1.2, borderaxespad=0.2, title="spikes per image", title_fontsize=6.5,
        )  # fmt: skip

    return [layer_figure(chunk, [draw], top=0.45) for chunk in chunks(neurons)]


def spike_raster(raster: Mapping[str, Any]) -> Figure:
    """Binary spikes of some neurons of a layer over the windows of several images, one image after the other.

    Args:
        raster: Record with ``spikes``, nested lists of 0 and 1 ``[images, T, neurons]``.
    """
    spikes = np.asarray(raster["spikes"], dtype=bool)
    images, steps, neurons = spikes.shape
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.035 * neurons), layout="constrained")
        axes = figure.subplots()
        image, step, neuron = np.nonzero(spikes)
        gap = 1
        axes.vlines(image * (steps + gap) + step + 1, neuron - 0.42, neuron + 0.42, color=BLACK, linewidth=1.6)
        for i in range(images):
            start = i * (steps + gap) + 0.5
            axes.axvspan(start, start + steps, color="#eef3f8" if i % 2 else "#f6f0e4", linewidth=0)
        axes.set_xticks(
            [i * (steps + gap) + (steps + 1) / 2 for i in range(images)], [str(i + 1) for i in range(images)]
        )
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(0.3, images * (steps + gap) + 0.2)
        axes.set_ylim(neurons - 0.4, -0.6)
        axes.set_xlabel(f"image (each field: {steps} time step{'s' if steps > 1 else ''})")
        axes.set_ylabel("neuron")
    return figure


def energy_by_layer(layers: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Bars of the energy of every layer in microjoules per image, with the columns of the measurement side by side.

    Args:
        layers: Records with ``name`` and ``energy_mj`` by column.
    """
    columns = [column for column in ENERGY_COLUMNS if any(column[0] in layer["energy_mj"] for layer in layers)]
    most = max((1e3 * (layer["energy_mj"].get(c[0]) or 0.0) for layer in layers for c in columns), default=0.0)

    def column_drawer(key: str, title: str, colour: str) -> Any:
        def draw(axes: Axes, chunk: Sequence[Mapping[str, Any]], rows: np.ndarray[Any, Any]) -> None:
            values = [1e3 * (layer["energy_mj"].get(key) or 0.0) for layer in chunk]
            axes.barh(rows, values, height=0.72, color=colour)
            axes.set_xlim(0, most * 1.05 or 1)
            axes.set_title(title.replace(" ", "\n", 1), fontsize=6.5, pad=3)
            axes.xaxis.set_major_locator(MaxNLocator(2))
            axes.tick_params(axis="x", labelsize=6.5)
            axes.grid(axis="x", color="#dddddd", linewidth=0.5)
            axes.set_axisbelow(True)

        return draw

    drawers = [column_drawer(*column) for column in columns]
    return [layer_figure(chunk, drawers, top=0.1, xlabel="µJ per image") for chunk in chunks(layers)]


def energy_totals(totals: Mapping[str, float]) -> Figure:
    """Bars of the total energy per image in millijoules, by column.

    Args:
        totals: Millijoules by column.
    """
    named = [(title, totals[key], colour) for key, title, colour in ENERGY_COLUMNS]
    return _totals(named, "mJ per image")


def energy_with_memory(bars: Sequence[tuple[str, str, float, float, float]]) -> Figure:
    """Bars of arithmetic and memory in millijoules per image, side by side for each dataflow.

    Args:
        bars: Dataflow, network, arithmetic, and memory at the lower and the upper price of DRAM.
    """
    flows = list(dict.fromkeys(flow for flow, *_ in bars))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.8 + 0.24 * len(bars)), layout="constrained")
        panels = figure.subplots(len(flows), 1, squeeze=False)[:, 0]
        for axes, flow in zip(panels, flows):
            shown = [bar[1:] for bar in bars if bar[0] == flow]
            rows = np.arange(len(shown))
            arithmetic, low, high = (np.array([bar[i] for bar in shown]) for i in (1, 2, 3))
            axes.barh(rows, arithmetic, height=0.7, color=ORANGE, label="arithmetic")
            axes.barh(rows, low, left=arithmetic, height=0.7, color=BLUE, label="memory")
            axes.hlines(rows, arithmetic + low, arithmetic + high, color=BLACK, linewidth=0.9)
            most = float((arithmetic + high).max())
            for row, total, end in zip(rows.tolist(), (arithmetic + low).tolist(), (arithmetic + high).tolist()):
                text = f"{total:.3g}" if end == total else f"{total:.3g} to {end:.3g}"
                axes.text(end + most * 0.02, row, text, va="center", fontsize=7)
            axes.set_yticks(rows, [bar[0] for bar in shown])
            axes.tick_params(axis="y", length=0)
            axes.invert_yaxis()
            axes.set_xlim(0, most * 1.35 or 1)
            axes.set_title(flow, fontsize=8, pad=3)
        panels[-1].set_xlabel("mJ per image")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=7)
    return figure


def sizes(entries: Sequence[tuple[str, float]]) -> Figure:
    """Bars of sizes in megabytes.

    Args:
        entries: Name and number of bytes of each bar.
    """
    return _totals([(name, size / 1e6, BLUE) for name, size in entries], "MB (10⁶ bytes)")


def delay_curve(rows: Sequence[Mapping[str, Any]], quantized_accuracy: float | None = None) -> Figure:
    """Accuracy and class agreement as functions of the delay.

    Args:
        rows: Records with ``delay``, ``accuracy`` and ``class_agreement`` (shares).
        quantized_accuracy: Accuracy of the trained network on the same images, drawn as a line; ``None`` for no line.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        axes = figure.subplots()
        delays = [row["delay"] for row in rows]
        for key, label, colour, marker, style in (
            ("accuracy", "accuracy", BLUE, "o", "-"),
            ("class_agreement", "same class as the trained network", ORANGE, "s", "--"),
        ):
            axes.plot(delays, [100 * row[key] for row in rows], style, color=colour, marker=marker, label=label, ms=5)
        if quantized_accuracy is not None:
            label = "accuracy of the trained network"
            axes.axhline(100 * quantized_accuracy, color=GREY, linewidth=0.9, linestyle=":", label=label)
        axes.set_xticks(delays)
        lowest = 100 * min(row[key] for row in rows for key in ("accuracy", "class_agreement"))
        margin = max(1.0, 0.15 * (100 - lowest))
        axes.set_ylim(max(lowest - margin, -3), 100 + 0.5 * margin)
        axes.set_xlabel("delay of every neuron, in time steps")
        axes.set_ylabel("% of images")
        axes.grid(axis="y", color="#dddddd", linewidth=0.5)
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), fontsize=7)
    return figure


def _totals(entries: Sequence[tuple[str, float, str]], unit: str) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.55 + 0.3 * len(entries)), layout="constrained")
        axes = figure.subplots()
        rows = np.arange(len(entries))
        values = [value for _, value, _ in entries]
        axes.barh(rows, values, height=0.7, color=[colour for *_, colour in entries])
        most = max(values, default=0.0)
        for row, value in zip(rows.tolist(), values):
            axes.text(value + most * 0.02, row, f"{value:.3g}", va="center")
        axes.set_yticks(rows, [name for name, *_ in entries])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, most * 1.2 or 1)
        axes.set_xlabel(unit)
    return figure


def layer_figure(
    chunk: Sequence[Mapping[str, Any]], drawers: Sequence[Any], top: float = 0.0, xlabel: str | None = None
) -> Figure:
    """Panels side by side over one axis of layers, whose names are grouped by stage.

    Args:
        chunk: Records with ``name``.
        drawers: One function per panel, which gets its axes, the records and their rows.
        top: Inches kept free above the panels.
        xlabel: Label below all panels; ``None`` for no label.
    """
    labels, rows, headers = [], [], []
    row = 0
    for group, members in _groups(chunk):
        if group:
            headers.append((row, group))
            row += 1
        for member in members:
            labels.append(member["name"].removeprefix(f"{group}."))
            rows.append(row)
            row += 1
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.02, wspace=0.01)
        figure = Figure(figsize=(WIDTH, 0.6 + top + _ROW * row), layout=layout)
        panels = figure.subplots(1, len(drawers), sharey=True, squeeze=False)[0]
        for axes, draw in zip(panels, drawers):
            draw(axes, chunk, np.array(rows))
            axes.tick_params(axis="y", length=0)
        panels[0].set_yticks(
            [*rows, *(row for row, _ in headers)], [*labels, *(name for _, name in headers)], fontsize=6.5
        )
        for tick, is_header in zip(panels[0].get_yticklabels(), [False] * len(rows) + [True] * len(headers)):
            tick.set_fontweight("bold" if is_header else "normal")
        panels[0].set_ylim(row - 0.4, -0.6)
        if xlabel:
            figure.supxlabel(xlabel, fontsize=8)
    return figure


def _groups(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Neighbouring layers of one stage: ``stages.2.blocks.0...`` belongs to ``stages.2``, ``head`` to no stage."""
    group = ""
    members: list[Mapping[str, Any]] = []
    for record in records:
        own = _group(record["name"])
        if members and own != group:
            yield group, members
            members = []
        group = own
        members.append(record)
    if members:
        yield group, members


def _group(name: str) -> str:
    parts = name.split(".")
    size = 2 if len(parts) > 2 and parts[1].isdecimal() else 1
    return ".".join(parts[:size]) if len(parts) > size else ""


def chunks(records: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    """Split layers into parts that fit on a printed page.

    Args:
        records: Records of the layers, with ``name``.
    """
    count = max(1, -(-len(records) // _MOST_ROWS))
    size = -(-len(records) // count)
    return [records[i : i + size] for i in range(0, len(records), size)]
