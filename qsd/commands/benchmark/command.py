"""Measure speed and memory side by side: inference, training, exported files, image loading, growth with size.

All cases of a table take turns in one process, in another order each round; a ratio is the median over the rounds.
Peak memory is that of a process of its own for each case; kept bytes are those that a forward pass keeps for the
backward pass, without parameters. The suite loading trains on JPEG files and gives the share of the time that a step
waits for them, and the images per second of folders, parquet files and shards beside a plain loop. Results go to
benchmark.json and benchmark.png.

On a CUDA device inference and training are measured for both families, at batch 64, in float32, TF32 and autocast, with
CUDA graphs; memory is that of PyTorch's allocator. Results go to benchmark-MODEL.json.

Examples:
  qsd benchmark                     (all suites for qsd_15m at 224 pixels; about an hour on two cores)
  qsd benchmark inference --quick
  qsd benchmark --device cuda --largest
  qsd benchmark training --precisions float32 bf16 --profile "quantized, eager, bf16"
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
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
from qsd.commands.benchmark.precisions import PRECISIONS
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
FAMILIES = ("qsd_15m", "csdformer_8_384")
COMPARED = ("inference", "training", "export")
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
    cuda = options.device.startswith("cuda")
    names = [options.model] if options.model else FAMILIES if cuda else FAMILIES[:1]
    if options.threads:
        torch.set_num_threads(options.threads)
    return Settings(
        suites=options.suites or (COMPARED[:2] if cuda else SUITES),
        name=names[0],
        also=names[1:],
        time_steps=options.time_steps,
        img_size=options.img_size,
        batch_size=options.batch_size or (64 if cuda else 8),
        num_classes=options.num_classes,
        rounds=options.rounds,
        device=torch.device(options.device),
        workers=options.workers,
        sizes=options.sizes,
        models=options.models,
        compile=not options.no_compile,
        precisions=options.precisions or (PRECISIONS if cuda else PRECISIONS[:1]),
        profile=options.profile,
        largest=options.largest,
        memory=not options.no_memory,
        out=options.out,
        peak=options.peak,
        passed_on=[word for word in args if word not in SUITES],
    )


def _parser() -> program.Parser:
    parser = program.Parser(prog="qsd benchmark", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE",
                        help=f"{', '.join(SUITES)}; the default is all")  # fmt: skip
    parser.add_argument("--model", help="registered name of the model; the default is qsd_15m, on CUDA both families")
    parser.add_argument("--time-steps", type=whole(1, 255), default=4, help="number of time steps T")
    parser.add_argument("--img-size", type=whole(1), default=224, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=whole(1), help="images per pass or step; the default is 8, on CUDA 64")
    parser.add_argument("--num-classes", type=whole(1), default=1000, help="outputs of the classifier")
    parser.add_argument("--rounds", type=whole(1), default=7, help="number of times that each case is timed")
    parser.add_argument("--threads", type=whole(1), help="threads of the processor; the default is PyTorch's choice")
    parser.add_argument("--device", type=device_name, default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=whole(0), help="processes that load images; the default is the data module's")
    parser.add_argument("--sizes", type=whole(1), nargs="+", default=SIZES, help="image sides of the table of growth")
    parser.add_argument("--models", nargs="+", default=MODELS, help="models of the table of growth")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS,
                        help="number formats; the default is float32, on CUDA all")  # fmt: skip
    parser.add_argument("--profile", metavar="CASE", help="list the kernels of a case, such as 'quantized, eager'")
    parser.add_argument("--largest", action="store_true", help="search the largest batch of each training step (CUDA)")
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
    for name in (settings.name, *settings.also):
        one = replace(settings, name=name, also=())
        if settings.profile is not None:
            _check_profile(one)
        _measure_model(one, console, f"benchmark-{name}" if settings.also else "benchmark")


def _check_profile(settings: Settings) -> None:
    """Refuse the name of a case that is not measured, before hours of measuring."""
    names = [case.name for suite in settings.suites if suite in COMPARED for case in cases_of(suite, settings)]
    if settings.profile not in names:
        raise QsdError(f"profile={settings.profile!r} is no case of this benchmark; cases: {'; '.join(names)}.")


def _measure_model(settings: Settings, console: Console, stem: str) -> None:
    """Measure all suites for one model, and write its files.

    Args:
        settings: The settings of the benchmark.
        console: The console to print on.
        stem: The name of the files without their endings.
    """
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
    if settings.device.type == "cuda":
        results["gpu"] = torch.cuda.get_device_name(settings.device)
    path = settings.out / f"{stem}.json"
    for suite in settings.suites:
        results[suite] = _measure_and_show(suite, settings, console)
        with replacing(path) as partial:  # after every suite: a long run is not lost
            partial.write_text(json.dumps(results, indent=1))
    draw(results, path.with_suffix(".png"))
    console.print(escape(f"written: {path}, {path.with_suffix('.png')}"))


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
