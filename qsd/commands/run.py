"""Classify images with an exported file, or draw the predictions of a detector or segmenter.

For a packed or an ONNX file of qsd export, or for weights of the package, the classes, the time and the energy of each
image are printed. A network over frames takes recordings of event cameras (.npy, .npz, .h5, .aedat, .aedat4, .bin) in
place of images. For a checkpoint .pth of a detector or segmenter the pictures go to the folder --out.

Examples:
  qsd run pictures/digit.png
  qsd run IMAGE... --model digits.int8.onnx
  qsd run IMAGE... --model DETECTOR.pth --out pictures
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qsd import program
from qsd.commands import openmmlab
from qsd.commands.devices import device_name
from qsd.commands.pictures import find_picture
from qsd.commands.predictor import Predictor
from qsd.errors import QsdError
from qsd.limits import number, whole
from qsd.models.shipped import shipped_weights
from qsd.reading import shown

_REPEATS = 5
_DEFAULT = "qsd_tiny.digits"


def main(args: Sequence[str] | None = None) -> int:
    """Run ``qsd run``.

    Args:
        args: The arguments; ``None`` for those of the process.

    Returns:
        The exit code, as of `qsd.program.run`.
    """
    return program.run("qsd", _command, args)


def _command(args: list[str]) -> None:
    options = _parser().parse_args(args)
    if openmmlab.is_checkpoint(options.model):
        _draw(options)
        return
    if options.out is not None:
        raise QsdError("--out is for detectors and segmenters; classes are printed, so drop it.")
    predictor = Predictor(_model_file(options.model))
    images = [find_picture(path) for path in options.images]
    Console().print(_classes(images, predictor, options.top))


def _parser() -> program.Parser:
    parser = program.Parser(prog="qsd run", description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or recordings")
    parser.add_argument("--model", default=_DEFAULT, metavar="FILE", help="packed or ONNX file, .pth of a training, or "
                        f"weights of the package by their name; the default is {_DEFAULT}")  # fmt: skip
    parser.add_argument("--top", type=whole(1), default=1, help="number of classes to print for each image")
    dense = parser.add_argument_group("detectors and segmenters")
    dense.add_argument("--out", metavar="DIR", help="folder of the pictures")
    dense.add_argument("--score", type=number(0, 1), default=0.3, help="lowest score of a box that is drawn")
    dense.add_argument("--device", type=device_name, default="cpu", help="cpu, cuda, cuda:1, ...")
    return parser


def _model_file(name: str) -> Path:
    """The file of a network: the path itself, or the weights of the package that have this name."""
    weights = shipped_weights().get(name)
    return Path(name) if weights is None or Path(name).exists() else weights.file


def _draw(options: argparse.Namespace) -> None:
    if options.out is None:
        raise QsdError("name the folder of the pictures with --out DIR.")
    from qsd.mm.drawing import draw_predictions

    written = draw_predictions(options.images, options.model, options.out, options.score, options.device)
    print(f"{len(written)} pictures in {options.out}")


def _classes(images: Sequence[str], predictor: Predictor, top: int) -> Table:
    """Classes, times and energies of images.

    Args:
        images: The image files.
        predictor: The exported network.
        top: The number of classes to show for each image.
    """
    pictures = [predictor.read(path) for path in images]  # all of them first, so that a mistake costs no waiting
    table = Table("image", "class", "probability", "ms", "µJ", title="Predictions", title_justify="left")
    table.caption = f"energy: {predictor.energy_of}"
    for path, picture in zip(images, pictures):
        predictor.logits(picture)
        times = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            logits = predictor.logits(picture)
            times.append(time.perf_counter() - start)
        shares, labels = logits[0].softmax(0).topk(min(top, logits.shape[1]))
        energy = predictor.energy(picture)
        names = "\n".join(shown(predictor.name(int(label))) for label in labels)
        percents = "\n".join(f"{100 * share:.1f} %" for share in shares.tolist())
        cost = "" if energy is None else f"{1e3 * energy:.3g}"
        # Names of classes and files may hold what rich would take for markup.
        table.add_row(Text(shown(path)), Text(names), percents, f"{1e3 * statistics.median(times):.2f}", cost)
    return table
