"""Figures of the information that the spikes of attention carry, for one network or several side by side.

A network is a record with ``label``, ``time_steps`` and ``signals``, as `qsd.report.attention` makes it; all have the
same layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qsd import plots
from qsd.information import BINS_PER_UNIT, HIGHEST, LOWEST

COLOURS = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.PURPLE)
_LINES = ("-", "--", "-.", ":")  # Networks can be told apart without colours.
_ROWS_OF_MEMBRANES = 6

Network = Mapping[str, Any]


def signal_name(signal: Mapping[str, Any]) -> str:
    """``stages.2.blocks.0.query`` for the queries of ``stages.2.blocks.0.attn``.

    Args:
        signal: The record of a signal.
    """
    return f"{signal['layer'].removesuffix('.attn')}.{signal['projection']}"


def signal_bars(networks: Sequence[Network], key: str, xlabel: str, limit: str | None = None) -> list[Figure]:
    """A quantity by layer, the networks that have it side by side on one scale.

    Args:
        networks: Records of networks; their order gives the colours.
        key: Key of the quantity in the records of the signals.
        xlabel: Name of the quantity, with its unit.
        limit: Key of the upper bound, which is drawn as a line.
    """
    names = [{"name": signal_name(signal), "index": i} for i, signal in enumerate(networks[0]["signals"])]
    coloured = [(n, c) for n, c in zip(networks, COLOURS) if n["signals"][0][key] is not None]
    networks = [network for network, _ in coloured]
    most = max((s[k] or 0.0 for n in networks for s in n["signals"] for k in (key, limit) if k), default=0.0)

    def panel(network: Network, colour: str) -> Any:
        def draw(axes: Axes, chunk: Sequence[Mapping[str, Any]], rows: np.ndarray[Any, Any]) -> None:
            signals = [network["signals"][entry["index"]] for entry in chunk]
            values = [signal[key] or 0.0 for signal in signals]
            axes.barh(rows, values, height=0.72, color=colour)
            if limit is not None and signals[0][limit] is not None:
                axes.axvline(signals[0][limit], color=plots.BLACK, linewidth=0.9, linestyle="--")
            if len(networks) == 1:
                for row, value in zip(rows.tolist(), values):
                    axes.text(value + most * 0.015, row, f"{value:.2f}", va="center", fontsize=6)
            axes.set_xlim(0, most * (1.2 if len(networks) == 1 else 1.05) or 1)
            axes.set_title(_wrapped(network["label"]) if len(networks) > 1 else "", fontsize=6.5, pad=3)
            axes.xaxis.set_major_locator(MaxNLocator(5 if len(networks) == 1 else 3))
            axes.tick_params(axis="x", labelsize=6.5)
            axes.grid(axis="x", color="#dddddd", linewidth=0.5)
            axes.set_axisbelow(True)

        return draw

    drawers = [panel(network, colour) for network, colour in coloured]
    lines = max(_wrapped(network["label"]).count("\n") for network in networks) + 1 if len(networks) > 1 else 0
    return [plots.layer_figure(chunk, drawers, top=0.12 * lines, xlabel=xlabel) for chunk in plots.chunks(names)]


def spike_counts(network: Network) -> list[Figure]:
    """Shares of neurons by spike count, by layer.

    Args:
        network: The record of a spiking network.
    """
    rows = []
    for signal in network["signals"]:
        numbers = np.array(signal["counts"]["histogram"], dtype=float)
        rows.append({"name": signal_name(signal), "histogram": (numbers / max(numbers.sum(), 1)).tolist()})
    return plots.count_histograms(rows)


def membranes(networks: Sequence[Network]) -> list[Figure]:
    """Distributions of the membranes, a row of panels per layer; dotted lines are the thresholds of the first network.

    Args:
        networks: Records of networks.
    """
    first = networks[0]["signals"]
    layers = list(dict.fromkeys(signal["layer"] for signal in first))
    by_place = [{(s["layer"], s["projection"]): s["membrane"]["histogram"] for s in n["signals"]} for n in networks]
    columns = ("query", "key", "value")
    edges = np.linspace(LOWEST, HIGHEST, (HIGHEST - LOWEST) * BINS_PER_UNIT + 1)
    low, high = _middle(np.array([histogram for found in by_place for histogram in found.values()]), edges)
    figures = []
    parts = -(-len(layers) // _ROWS_OF_MEMBRANES)
    for part in np.array_split(np.array(layers), parts):
        with matplotlib.rc_context(plots.STYLE):
            figure = Figure(figsize=(plots.WIDTH, 0.75 + 0.62 * len(part)), layout="constrained")
            panels = figure.subplots(len(part), 3, sharex=True, squeeze=False)
            for layer, row in zip(part.tolist(), panels):
                for projection, axes in zip(columns, row):
                    _membrane(axes, [found[layer, projection] for found in by_place], edges, networks[0]["time_steps"])
                    axes.set_xlim(low, high)
                row[0].set_ylabel(layer.removesuffix(".attn").replace(".blocks", "\nblocks"), fontsize=6)
            for projection, axes in zip(columns, panels[0]):
                axes.set_title(projection, fontsize=8, pad=3)
            figure.supxlabel("membrane; at 1 a neuron fires T spikes", fontsize=8)
            if len(networks) > 1:
                lines = panels[0][0].get_lines()[: len(networks)]
                labels = [network["label"] for network in networks]
                figure.legend(lines, labels, loc="outside upper left", fontsize=6.5, ncols=min(2, len(labels)))
        figures.append(figure)
    return figures


def _membrane(
    axes: Axes, histograms: Sequence[Sequence[int]], edges: np.ndarray[Any, Any], time_steps: int | None
) -> None:
    for histogram, colour, style in zip(histograms, COLOURS, _LINES):
        density = np.array(histogram) * BINS_PER_UNIT / max(sum(histogram), 1)
        axes.plot((edges[1:] + edges[:-1]) / 2, density, color=colour, linestyle=style, linewidth=0.9)
    for count in range(time_steps or 0):
        axes.axvline((count + 0.5) / (time_steps or 1), color=plots.GREY, linewidth=0.5, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=6)


def _middle(histograms: np.ndarray[Any, Any], edges: np.ndarray[Any, Any]) -> tuple[float, float]:
    """A range that holds 0 to 1, and all but a thousandth of every membrane on each side."""
    shares = histograms.cumsum(1) / np.maximum(histograms.sum(1, keepdims=True), 1)
    low = edges[int((shares > 1e-3).argmax(1).min())]
    high = edges[int((shares >= 1 - 1e-3).argmax(1).max()) + 1]
    return min(float(low), 0.0), max(float(high), 1.0)


def _wrapped(label: str) -> str:
    """A label in short lines."""
    lines = [""]
    for word in label.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) > 14:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
