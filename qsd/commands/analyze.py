"""Measure the information in the spikes of attention layers, or draw where a network fires for an image.

Several checkpoints are compared side by side. With --image one network is drawn instead: firing rates by stage laid
over the image, attention as a map, and spikes over time. It may also be a packed file, or the checkpoint .pth of a
detector or segmenter.

The images are those of the first checkpoint's training, whose config.yaml is in the folder of its run; otherwise name
them with --config or --data. The plots are on one page.

Examples:
  qsd analyze CHECKPOINT
  qsd analyze BEFORE AFTER --labels "T = 4" "T = 4, distilled" --teacher TEACHER
  qsd analyze CHECKPOINT --image IMAGE --out pictures
"""

import json
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from qsd import program
from qsd.commands.analyze_image import analyze_image
from qsd.commands.data import (
    PARTS,
    DataParser,
    add_data_arguments,
    add_device_argument,
    data_from_arguments,
    parse_with_config,
)
from qsd.distillation import build_teacher
from qsd.errors import QsdError
from qsd.files import replacing_together
from qsd.information import measure_information
from qsd.limits import whole
from qsd.report.attention import attention_html, attention_record, findings, network_record
from qsd.tasks import load_task

_FILES = ("attention.json", "attention.html")


def main(args: Sequence[str] | None = None) -> int:
    """Run ``qsd analyze``.

    Args:
        args: The arguments; ``None`` for those of the process.

    Returns:
        The exit code, as of `qsd.program.run`.
    """
    return program.run("qsd", _command, args)


def _command(args: list[str]) -> None:
    options = parse_with_config(_parser, args, _config_of)
    if options.image is not None:
        page, *others = analyze_image(options)
        print(f"page: {page}; {', '.join(path.name for path in others)}")
        return
    record = _analyze(options)
    table = Table(title="Information in the spikes of attention", show_header=False, title_justify="left")
    for finding in findings(record):
        table.add_row(escape(finding.title.rstrip(",:")), escape(finding.text))
    Console().print(table)
    print(f"page: {Path(options.out) / _FILES[1]}")


def _parser(config: str | Path | None) -> DataParser:
    parser = DataParser(prog="qsd analyze", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoints",
        nargs="+",
        help=".ckpt files of trainings with the same attention layers; with --image also .safetensors or .pth",
    )
    parser.add_argument("--image", help="image file to draw the spikes of, for one network")
    parser.add_argument("--labels", nargs="+", help="names of the checkpoints; the default are their runs' folders")
    parser.add_argument("--out", default="attention", help="folder for the page and its numbers")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier analysis")
    parser.add_argument("--part", choices=tuple(PARTS), default="val", help="part of the data to measure on")
    parser.add_argument("--max-images", type=whole(1), help="number of images to measure on; the default is all")
    parser.add_argument("--teacher", help="checkpoint or timm name of a teacher to compare token similarities with")
    parser.add_argument("--teacher-weights", help="weights of a teacher that is given by its timm name")
    add_device_argument(parser)
    add_data_arguments(parser, config)
    return parser


def _analyze(options: Namespace) -> dict[str, Any]:
    """Measure, and write the page and its numbers.

    Args:
        options: The parsed options.

    Returns:
        The record of the measurements.

    Raises:
        QsdError: If a checkpoint cannot be read or compared, or a file exists.
    """
    folder = Path(options.out)
    program.refuse_existing((folder / name for name in _FILES), options.force)
    labels = options.labels or [_label_of(Path(path)) for path in options.checkpoints]
    if len(labels) != len(options.checkpoints):
        raise QsdError(f"{len(labels)} labels for {len(options.checkpoints)} checkpoints; give one each.")
    data = data_from_arguments(options)
    networks = _measure(options, labels, data)
    record = attention_record(networks, f"{PARTS[options.part]} images of {type(data).__name__}", options.teacher)
    with replacing_together(folder) as partial:
        for name, text in zip(_FILES, (json.dumps(record, indent=1) + "\n", attention_html(record))):
            (partial / name).write_text(text, encoding="utf-8")
    return record


def _measure(options: Namespace, labels: Sequence[str], data: Any) -> list[dict[str, Any]]:
    """The records of the networks."""
    loader = data.whole_part(options.part)
    tasks = [load_task(path) for path in options.checkpoints]
    teacher = build_teacher(options.teacher, options.teacher_weights) if options.teacher else None
    if teacher is not None:
        teacher.network.to(options.device)
    networks = []
    console = Console(stderr=True)
    for path, label, task in track(list(zip(options.checkpoints, labels, tasks)), "measuring", console=console):
        network: Any = task.model.to(options.device)
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
    return networks


def _label_of(path: Path) -> str:
    """``digits/version_0`` for ``runs/digits/version_0/checkpoints/best.ckpt``, otherwise the name of the file."""
    return "/".join(path.parts[-4:-2]) if path.parent.name == "checkpoints" else path.stem


def _config_of(checkpoint: str) -> Path | None:
    """The configuration that a training wrote into the folder of its run."""
    path = Path(checkpoint).parent.parent / "config.yaml"
    return path if path.is_file() else None
