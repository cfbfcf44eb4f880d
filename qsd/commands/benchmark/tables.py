"""The tables and plots of a benchmark."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.table import Table


def show(console: Console, title: str, results: dict[str, Any]) -> None:
    """Print the table of a suite.

    Args:
        console: The console to print on.
        title: The title of the table.
        results: The results by case.
    """
    extra: dict[str, Callable[[Any], str]] = {
        "peak memory": lambda row: f"{row['peak_memory']['peak'] / 1e9:.2f} GB" if "peak_memory" in row else "",
        "kept bytes": lambda row: f"{row['kept_bytes'] / 1e6:.0f} MB" if "kept_bytes" in row else "",
        "images/s": lambda row: f"{row['images_per_second']:.1f}" if "images_per_second" in row else "",
        "allocator": lambda row: f"{row['allocator_peak'] / 1e9:.2f} GB" if "allocator_peak" in row else "",
        "largest batch": lambda row: _largest(row["largest"]) if "largest" in row else "",
        "file": lambda row: f"{row['file_bytes'] / 1e6:.1f} MB" if "file_bytes" in row else "",
    }
    extra = {column: told for column, told in extra.items() if any(map(told, results.values()))}
    table = Table("case", "seconds", "quartiles", "ratio", "to", "target", *extra, title=title)
    for name, row in results.items():
        ratios = row.get("ratios", {})
        table.add_row(
            name,
            f"{row['median']:.4f}",
            f"{row['lower_quartile']:.4f} - {row['upper_quartile']:.4f}",
            "\n".join(f"{_colour(ratio)}{ratio['median']:.3f}[/]" for ratio in ratios.values()),
            "\n".join(ratios),
            "\n".join("" if ratio["target"] is None else f"{ratio['target']:.3g}" for ratio in ratios.values()),
            *(told(row) for told in extra.values()),
        )
    console.print(table)
    for name, row in results.items():
        for versus, kept in row.get("kept_ratios", {}).items():
            colour = "green" if kept["ratio"] <= kept["target"] else "red"
            kept_ratio = f"[{colour}]{kept['ratio']:.3f}[/{colour}] (target {kept['target']:g})"
            console.print(f"kept bytes, {name}: {kept_ratio} of {versus}")
        if "profile" in row:
            console.print(f"\nkernels, {name}:\n")
            console.print(row["profile"], markup=False, highlight=False, soft_wrap=True)


def _largest(found: dict[str, Any]) -> str:
    if not found["batch_size"]:
        return "none fits"
    return f"{found['batch_size']}: {found['images_per_second']:.1f}/s, {found['allocator_peak'] / 1e9:.2f} GB"


def _colour(ratio: dict[str, Any]) -> str:
    if ratio["target"] is None:
        return "[default]"
    return "[green]" if ratio["median"] <= ratio["target"] else "[red]"


def show_loading(console: Console, results: dict[str, Any]) -> None:
    """Print the share of the time that a training step waits for images.

    Args:
        console: The console to print on.
        results: The results of the suite ``"loading"``.
    """
    console.print(
        f"loading: {100 * results['share_waiting']:.1f} % of the time waiting, {results['workers']} workers; "
        f"{results['seconds_waiting']:.3f} s waiting and {results['seconds_training']:.3f} s training per step; "
        f"{results['images_per_second']:.0f} images per second from the loader alone"
    )
    events = results["recordings"]
    console.print(
        f"recordings: {events['events_per_second'] / 1e6:.2f} million events per second into frames; "
        f"{100 * events['share_waiting']:.1f} % of the time waiting, {events['seconds_waiting']:.3f} s waiting and "
        f"{events['seconds_training']:.3f} s training per step"
    )


def show_sizes(console: Console, results: dict[str, Any]) -> None:
    """Print the tables of growth.

    Args:
        console: The console to print on.
        results: The results of the suite ``"sizes"``.
    """
    for axis, rows in results.items():
        names = list(rows["exponents"])
        table = Table("", *names, title=f"seconds per image over {axis}")
        for i, label in enumerate(rows["label"]):
            table.add_row(label, *(f"{rows[name][i]:.3f}" for name in names))
        table.add_row("exponent", *(f"{rows['exponents'][name]:.2f}" for name in names))
        console.print(table)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw bars of the times, and growth on logarithmic axes.

    Args:
        results: The results by suite.
        path: The PNG file to write.
    """
    mpl.use("agg")
    from matplotlib import pyplot as plt

    bars = [suite for suite in ("inference", "training", "export") if suite in results]
    growth, loading = list(results.get("sizes", {})), results.get("loading")
    count = len(bars) + len(growth) + (loading is not None)
    figure, axes = plt.subplots(1, count, figsize=(6 * count, 4), squeeze=False)
    for axis, suite in zip(axes[0], bars):
        rows = results[suite]
        middle = np.array([row["median"] for row in rows.values()])
        errors = [
            [row["median"] - row["lower_quartile"] for row in rows.values()],
            [row["upper_quartile"] - row["median"] for row in rows.values()],
        ]
        axis.barh(list(rows), middle, xerr=errors, color="#4c72b0")
        axis.invert_yaxis()
        axis.set(title=suite, xlabel="seconds (median, quartiles)")
    for axis, name in zip(axes[0][len(bars) :], growth):
        rows = results["sizes"][name]
        for key, exponent in rows["exponents"].items():
            axis.loglog(rows["x"], rows[key], marker="o", label=f"{key} (exponent {exponent:.2f})")
        axis.set(title=f"growth with {name}", xlabel=name, ylabel="seconds per image")
        axis.legend()
    if loading is not None:
        seconds = [loading["seconds_waiting"], loading["seconds_training"]]
        axes[0][-1].barh(["waiting for images", "training"], seconds, color="#4c72b0")
        axes[0][-1].set(title="loading", xlabel="seconds per step (median)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
