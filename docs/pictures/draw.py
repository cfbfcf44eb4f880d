"""Draw the pictures of README and documentation: ``python docs/pictures/draw.py [FOLDER]``.

The first picture is computed with the package's own one-step functions. The second one shows measured figures; the
conditions are stated in ``docs/results.md``, ``docs/detection.md`` and ``docs/benchmarks.md``.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from qsd.functional import spike_count
from qsd.spiking.steps import charge, fire

BLUE, ORANGE, GREEN, GREY, DARK = "#2f6fab", "#d9762b", "#3b8f5a", "#9aa3ad", "#22303c"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": DARK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": DARK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "svg.hashsalt": "qsd",
}
TIME_STEPS, DELAY = 4, 3
CURRENTS = (1.3, -0.8, 1.5, 0.7)  # of one neuron, in thresholds; the sum rounds to three spikes


def main(arguments: list[str] | None = None) -> int:
    """Write all pictures into a folder, by default the one of this file.

    Args:
        arguments: The folder, or nothing.
    """
    words = sys.argv[1:] if arguments is None else arguments
    folder = Path(words[0]) if words else Path(__file__).parent
    with mpl.rc_context(STYLE):
        for name, draw in (("counts_and_spikes", counts_and_spikes), ("results", results), ("engine", engine)):
            draw().savefig(folder / f"{name}.svg", facecolor="white", metadata={"Date": None})
    return 0


def counts_and_spikes() -> Figure:
    """One activation: the count of the quantized network, and the same count fired by a delayed neuron."""
    figure = Figure(figsize=(9.6, 3.7), layout="constrained")
    left, right = figure.subplot_mosaic([["count", "spikes"]], width_ratios=[1, 1.75]).values()
    total = sum(CURRENTS)
    _staircase(left, total)
    _delayed_neuron(right)
    return figure


def _staircase(axes: Axes, total: float) -> None:
    drive = torch.linspace(-0.8, 5.0, 600)
    axes.plot(drive, spike_count(drive, TIME_STEPS), color=BLUE, linewidth=2)
    count = int(spike_count(torch.tensor(total), TIME_STEPS))
    axes.plot([total, total, -0.8], [-0.4, count, count], color=ORANGE, linewidth=1.2, linestyle=(0, (3, 2)))
    axes.plot([total], [count], "o", color=ORANGE, markersize=7)
    axes.annotate(f"z = {total:.1f} thresholds\ngive the count {count}", (total, count), (2.95, 1.35), fontsize=9.5)
    axes.set(title="Training: one pass, a count", xlabel="input z, in thresholds", ylabel="spike count n")
    axes.set(xlim=(-0.8, 5.0), ylim=(-0.4, 4.6), xticks=range(6), yticks=range(5))


def _delayed_neuron(axes: Axes) -> None:
    steps = TIME_STEPS + DELAY
    membrane, spikes = torch.full((1,), 0.5), torch.zeros(steps, 1)
    path: list[tuple[float, float]] = [(0.0, 0.5)]
    for step in range(steps):
        if step < TIME_STEPS:
            charge(membrane, torch.tensor([CURRENTS[step]]))
            path += [(step + 0.5, path[-1][1]), (step + 0.5, float(membrane))]
        if step >= DELAY:
            before = float(membrane)
            fire(membrane, 1.0, spikes[step])
            path += [(step + 1.0, before), (step + 1.0, float(membrane))]
    path.append((steps + 0.4, path[-1][1]))
    axes.axvspan(0, DELAY + 0.5, color=BLUE, alpha=0.07, linewidth=0)
    axes.axvspan(DELAY + 0.5, steps + 0.4, color=ORANGE, alpha=0.08, linewidth=0)
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    axes.text(steps + 0.35, 1.08, "threshold", color="#6b747d", fontsize=9, ha="right")
    axes.plot(*zip(*path), color=BLUE, linewidth=2)
    for step, current in enumerate(CURRENTS):
        axes.text(step + 0.5, -0.52, f"{current:+.1f}".replace("-", "−"), ha="center", color=BLUE, fontsize=9.5)
    axes.text(-0.12, -0.52, "input", ha="right", color=BLUE, fontsize=9.5)
    axes.text(-0.12, -1.05, "spikes", ha="right", color=ORANGE, fontsize=9.5)
    for step in range(DELAY, steps):
        fired = bool(spikes[step])
        axes.plot([step + 1.0] * 2, [-1.2, -0.85], color=ORANGE, linewidth=4 if fired else 0)
        if not fired:
            axes.text(step + 1.0, -1.11, "none", ha="center", color="#6b747d", fontsize=8.5)
    axes.text(DELAY / 2 + 0.25, 4.0, "charges, and waits T − 1 = 3 steps", ha="center", color=BLUE, fontsize=9.5)
    fires = f"fires {int(spikes.sum())} binary spikes"
    axes.text((DELAY + steps + 0.9) / 2, 4.0, fires, ha="center", color=ORANGE, fontsize=9.5)
    axes.set(title="Inference: binary spikes over time, T = 4", xlabel="time step", ylabel="membrane potential")
    axes.set(xlim=(0, steps + 0.4), ylim=(-1.3, 4.5), yticks=range(5), xticks=np.arange(steps) + 0.5)
    axes.set_xticklabels([str(step + 1) for step in range(steps)])


def results() -> Figure:
    """Three measured results, each a panel."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    exact, energy, memory = figure.subplots(1, 3)
    delays, accuracies = range(4), (64.25, 98.00, 99.00, 99.50)
    exact.axhline(99.5, color=GREY, linewidth=1, linestyle="--")
    exact.text(3.35, 101, "quantized network: 99.50", fontsize=8.5, color="#6b747d", ha="right")
    exact.plot(delays, accuracies, "o-", color=BLUE, linewidth=2)
    for delay, accuracy in zip(delays, accuracies):
        exact.annotate(f"{accuracy:.2f}", (delay, accuracy), (8, -11), textcoords="offset points", fontsize=8.5)
    exact.set(title="Exact at delay T − 1", xlabel="delay in steps, T = 4", ylabel="accuracy in %, digits")
    exact.set(xticks=delays, ylim=(60, 105), xlim=(-0.3, 3.6))
    names, values = ("spikes,\nmerged", "spikes,\nunmerged", "integer\nnetwork"), (0.67, 0.48, 3.2)
    _bars(energy, names, values, (BLUE, BLUE, GREY), "{:.2f}")
    energy.set(title="Energy of a detector", ylabel="mJ per scene, 45 nm, FP32")
    _bars(memory, ("ours", "float twin", "ours, plain\nautograd"), (517, 884, 1210), (BLUE, GREY, GREY), "{:.0f}")
    memory.set(title="Memory of training", ylabel="MB kept, qsd_15m, batch 8")
    return figure


def _bars(axes: Axes, names: tuple[str, ...], values: tuple[float, ...], colours: tuple[str, ...], form: str) -> None:
    bars = axes.bar(names, values, color=colours, width=0.62)
    axes.bar_label(bars, [form.format(value) for value in values], padding=2, fontsize=8.5)
    axes.tick_params(axis="x", length=0, labelsize=8.5)
    axes.margins(y=0.14)


def engine() -> Figure:
    """From the trained network to the ways to run the converted one, and to the measurements that read these runs."""
    figure = Figure(figsize=(9.6, 5.4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 96), ylim=(0, 54))
    axes.axis("off")
    _box(axes, (2, 39), (22, 13), "Trained network", "counts times amplitude,\nlow-bit weights,\nbatch norms", BLUE)
    _box(
        axes,
        (34, 39),
        (26, 13),
        "Conversion",
        "one rule for each type of layer:\nnorms folded, chains merged,\nneurons delayed",
        GREEN,
    )
    _box(
        axes,
        (70, 39),
        (24, 13),
        "SpikingNetwork",
        "timed layers, one Runtime,\namplitudes in the weights,\nchecked on a random image",
        ORANGE,
    )
    _arrow(axes, (24.3, 45.5), (33.7, 45.5))
    _arrow(axes, (60.3, 45.5), (69.7, 45.5))
    modes = (
        ("Count domain", "spiking(images)\none pass over [B, …]\ncounts 0 … T", "count()"),
        ("Stepping", "simulate(images)\na layer at a time, [T·B, …]\nspikes 0 or 1", "step()"),
        ("Clock", "stream(images)\nall layers in every tick\nimages in a row", "tick()"),
        ("Trace", "marked tensors:\nwhose spikes, and\nwhen they arrive", "source(), arrival"),
    )
    axes.plot([12.5, 83.5], [34.5, 34.5], color=GREY, linewidth=1.5)
    axes.plot([83.5, 83.5], [34.5, 38.7], color=GREY, linewidth=1.5)
    for i, (title, text, method) in enumerate(modes):
        x = 2 + 23.67 * i
        _box(axes, (x, 18), (21, 13), title, text, BLUE)
        _arrow(axes, (x + 10.5, 34.6), (x + 10.5, 31.2))
        axes.text(x + 10.5, 15.6, method, ha="center", fontsize=9, color="#6b747d", family="DejaVu Sans Mono")
    lines = (
        "Audit and energy watch the operations of a run. Latency and interval come from the trace.",
        "In float64 all runs give equal counts at every neuron if every delay is at least T − 1.",
    )
    _box(axes, (2, 2), (92, 10.5), "Measurements", "\n".join(lines), ORANGE)
    return figure


def _box(
    axes: Axes, corner: tuple[float, float], size: tuple[float, float], title: str, text: str, colour: str
) -> None:
    (x, y), (width, height) = corner, size
    shape = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=1.2", linewidth=1.5)
    shape.set(edgecolor=colour, facecolor=mpl.colors.to_rgba(colour, 0.07))
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height - 2.6, title, ha="center", va="center", fontweight="bold", fontsize=11)
    axes.text(x + width / 2, y + (height - 4.2) / 2, text, ha="center", va="center", fontsize=9.5, linespacing=1.4)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=GREY, linewidth=1.5))


if __name__ == "__main__":
    sys.exit(main())
