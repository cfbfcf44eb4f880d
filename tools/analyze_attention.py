"""Measure what attention's spikes tell: one checkpoint, or several side by side, with plots on one page.

python tools/analyze_attention.py CHECKPOINT
python tools/analyze_attention.py BEFORE AFTER --labels "T = 4" "T = 4, distilled" --teacher TEACHER

The images are those of the first checkpoint's training, whose config.yaml lies in its run's folder; otherwise name
them with --config or --data.
"""

import json
import sys
from pathlib import Path

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qsd.data.arguments import add_data_arguments, data_from_arguments, parse_with_config
from qsd.distillation import build_teacher
from qsd.errors import QsdError
from qsd.information import measure_information
from qsd.report.attention import attention_html, attention_record, findings, network_record
from qsd.tasks import load_task

FILES = ("attention.json", "attention.html")
PARTS = {"train": "training", "val": "validation", "test": "test"}


def build_parser(config: str | Path | None) -> ArgumentParser:
    parser = ArgumentParser(prog="analyze_attention", description=__doc__.splitlines()[0], exit_on_error=False)
    parser.add_argument("checkpoints", nargs="+", help=".ckpt files of trainings with the same attention layers")
    parser.add_argument("--labels", nargs="+", help="what to call them; the default is their runs' folders")
    parser.add_argument("--config", help="configuration of a training, whose data is taken")
    add_data_arguments(parser, config)
    parser.add_argument("--part", choices=tuple(PARTS), default="val", help="images to measure on")
    parser.add_argument("--max-images", type=int, help="measure on so many images; the default is all")
    parser.add_argument("--teacher", help="checkpoint or timm name of a teacher to compare token similarities with")
    parser.add_argument("--teacher-weights", help="weights of a teacher by name")
    parser.add_argument("--out", default="attention", help="folder for the page and its numbers")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier analysis")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    return parser


def analyze(options: Namespace) -> dict:
    """Measure as the options say, and write page and numbers.

    Args:
        options: of the command line.

    Raises:
        QsdError: for checkpoints that cannot be read or compared, and files that exist.
    """
    folder = Path(options.out)
    existing = [folder / name for name in FILES if (folder / name).exists()]
    if existing and not options.force:
        raise QsdError(f"{existing[0]} exists; pass --force to replace it, or another --out.")
    labels = options.labels or [label_of(Path(path)) for path in options.checkpoints]
    if len(labels) != len(options.checkpoints):
        raise QsdError(f"{len(labels)} labels for {len(options.checkpoints)} checkpoints; give one each.")
    data = data_from_arguments(options)
    loader = data.whole_part(options.part)
    tasks = [load_task(path) for path in options.checkpoints]
    teacher = build_teacher(options.teacher, options.teacher_weights) if options.teacher else None
    if teacher is not None:
        teacher.network.to(options.device)
    networks = []
    console = Console(stderr=True)
    for path, label, task in track(list(zip(options.checkpoints, labels, tasks)), "measuring", console=console):
        network = task.model.to(options.device)
        found = measure_information(network, loader, teacher, (data.mean, data.std), options.max_images or float("inf"))
        networks.append(
            network_record(
                label,
                found,
                model=task.hparams["model"],
                time_steps=getattr(network, "time_steps", None),
                weight_bits=getattr(network, "weight_bits", None),
                checkpoint=str(path),
            )
        )
    record = attention_record(networks, f"{PARTS[options.part]} images of {type(data).__name__}", options.teacher)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(FILES, (json.dumps(record, indent=1) + "\n", attention_html(record))):
        partial = folder / f"{name}.part"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)
    return record


def label_of(path: Path) -> str:
    """``digits/version_0`` for ``runs/digits/version_0/checkpoints/best.ckpt``, else the file's name."""
    return "/".join(path.parts[-4:-2]) if path.parent.name == "checkpoints" else path.stem


def config_of(checkpoint: str) -> Path | None:
    """The configuration that a training wrote into its run's folder."""
    path = Path(checkpoint).parent.parent / "config.yaml"
    return path if path.is_file() else None


def main(args: list[str] | None = None) -> int:
    try:
        options = parse_with_config(build_parser, args, config_of)
        record = analyze(options)
    except (QsdError, ArgumentError, OSError) as error:
        print(f"analyze_attention: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    table = Table(title="What attention's spikes tell", show_header=False, title_justify="left")
    for finding in findings(record):
        table.add_row(finding.title.rstrip(",:"), finding.text)
    Console().print(table)
    print(f"page: {Path(options.out) / FILES[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
