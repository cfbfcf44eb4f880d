"""Measure speed and memory side by side: inference, training, exported files, image loading, growth with size.

All cases of a table take turns in one process, in another order each round; a ratio is the median over the rounds.
Peak memory is that of a process of its own for each case; kept bytes are those that a forward pass keeps for the
backward pass, without parameters. The suite loading trains on JPEG files and gives the share of the time that a step
waits for them, and the images per second of folders, parquet files and shards beside a plain loop. Results go to
benchmark.json and benchmark.png.

Examples:
  qsd benchmark                     (all suites for qsd_15m at 224 pixels; about an hour on two cores)
  qsd benchmark inference --quick
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from qsd import program
from qsd.commands.benchmark.cases import cases_of
from qsd.commands.benchmark.formats import formats, show_formats
from qsd.commands.benchmark.loading import loading
from qsd.commands.benchmark.meter import report_peak
from qsd.commands.benchmark.recordings import recordings
from qsd.commands.benchmark.settings import Settings
from qsd.commands.benchmark.suites import compare, growth
from qsd.commands.benchmark.tables import draw, show, show_loading, show_sizes
from qsd.commands.devices import device_name
from qsd.errors import QsdError
from qsd.files import replacing
from qsd.limits import whole

SUITES = ("inference", "training", "export", "loading", "sizes")
SIZES = (128, 192, 256, 384, 512)
MODELS = ("qsd_8m", "qsd_15m", "qsd_31m", "qsd_55m")
_QUICK: dict[str, Any] = {
    "model": "qsd_tiny",
    "img_size": 64,
    "batch_size": 4,
    "rounds": 3,
    "num_classes": 10,
    "sizes": (48, 64),
    "models": ("qsd_tiny", "qsd_8m"),
    "no_compile": True,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run ``qsd benchmark``.

    Args:
        args: The arguments; ``None`` for those of the process.

    Returns:
        The exit code, as of `qsd.program.run`.
    """
    return program.run("qsd", lambda words: _run(parse(words)), args)


def parse(args: list[str]) -> Settings:
    """The settings that the arguments give.

    Args:
        args: The arguments.

    Raises:
        QsdError: If one is wrong.
    """
    parser = _parser()
    if "--quick" in args:
        parser.set_defaults(**_QUICK)
    options = parser.parse_args(args)
    if unknown := [suite for suite in options.suites if suite not in SUITES]:
        raise QsdError(f"suite {unknown[0]!r} is unknown; choose from {', '.join(SUITES)}.")
    if options.threads:
        torch.set_num_threads(options.threads)
    return Settings(
        suites=options.suites or SUITES,
        name=options.model,
        time_steps=options.time_steps,
        img_size=options.img_size,
        batch_size=options.batch_size,
        num_classes=options.num_classes,
        rounds=options.rounds,
        device=torch.device(options.device),
        workers=options.workers,
        sizes=options.sizes,
        models=options.models,
        compile=not options.no_compile,
        memory=not options.no_memory,
        out=options.out,
        peak=options.peak,
        passed_on=[word for word in args if word not in SUITES],
    )


def _parser() -> program.Parser:
    parser = program.Parser(prog="qsd benchmark", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE",
                        help=f"{', '.join(SUITES)}; the default is all")  # fmt: skip
    parser.add_argument("--model", default="qsd_15m", help="registered name of the model")
    parser.add_argument("--time-steps", type=whole(1, 255), default=4, help="number of time steps T")
    parser.add_argument("--img-size", type=whole(1), default=224, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=whole(1), default=8, help="images per pass or step")
    parser.add_argument("--num-classes", type=whole(1), default=1000, help="outputs of the classifier")
    parser.add_argument("--rounds", type=whole(1), default=7, help="number of times that each case is timed")
    parser.add_argument("--threads", type=whole(1), help="threads of the processor; the default is PyTorch's choice")
    parser.add_argument("--device", type=device_name, default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=whole(0), help="processes that load images; the default is the data module's")
    parser.add_argument("--sizes", type=whole(1), nargs="+", default=SIZES, help="image sides of the table of growth")
    parser.add_argument("--models", nargs="+", default=MODELS, help="models of the table of growth")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled cases")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--quick", action="store_true", help="small model, small images, three rounds, no compilation")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for benchmark.json and benchmark.png")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser


def _run(settings: Settings) -> None:
    if settings.peak:
        report_peak(settings, cases_of(settings.suites[0], settings))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)  # a table in a file needs its columns
    results: dict[str, Any] = {
        "model": settings.name,
        "time_steps": settings.time_steps,
        "img_size": settings.img_size,
        "batch_size": settings.batch_size,
        "device": str(settings.device),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for suite in settings.suites:
        results[suite] = _measure_and_show(suite, settings, console)
        with replacing(settings.out / "benchmark.json") as partial:  # after every suite: a long run is not lost
            partial.write_text(json.dumps(results, indent=1))
    draw(results, settings.out / "benchmark.png")
    console.print(escape(f"written: {settings.out / 'benchmark.json'}, {settings.out / 'benchmark.png'}"))


def _measure_and_show(suite: str, settings: Settings, console: Console) -> dict[str, Any]:
    if suite == "sizes":
        results = growth(settings)
        show_sizes(console, results)
    elif suite == "loading":
        results = {**loading(settings.model(), settings), "recordings": recordings(settings)}
        show_loading(console, results)
        results["formats"] = formats(settings)
        show_formats(console, results["formats"])
    else:
        results = compare(suite, settings)
        how = f"{settings.batch_size} images one by one" if suite == "export" else f"batch {settings.batch_size}"
        show(console, f"{suite}, {settings.name}, {settings.img_size} px, {how}", results)
    return results
