"""Train a small network on handwritten digits, test it, convert it to binary spikes, and print the results.

No data are downloaded: the digits are those of scikit-learn. Everything is written to the folders runs and data of the
current folder.

  digits         a classifier of 8 x 8 digits (about four minutes on two cores); with --pretrained the trained network
                 of the package instead (about ten seconds)
  events         a classifier of digits that move in front of a simulated event camera (about five minutes)
  detection      a detector of digits on photographs; needs qsd[mm]
  segmentation   a segmenter of digits on photographs; needs qsd[mm]
  scenes         the images of detection and segmentation alone

Examples:
  qsd demo
  qsd demo events
  qsd demo --pretrained
  qsd demo detection
  qsd demo scenes data/digit_scenes
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from qsd import program
from qsd.limits import LARGEST_SEED, whole

_SCENES = Path("data/digit_scenes")


def main(args: Sequence[str] | None = None) -> int:
    """Run ``qsd demo``.

    Args:
        args: The arguments; ``None`` for those of the process.

    Returns:
        The exit code, as of `qsd.program.run`.
    """
    return program.run("qsd", _command, args)


def _command(args: list[str]) -> int:
    kinds = {"digits": _digits, "events": _digits, "detection": _dense, "segmentation": _dense, "scenes": _scenes}
    parser = program.Parser(prog="qsd demo", description=__doc__)
    parser.add_argument("kind", nargs="?", choices=kinds, default="digits", help="the demonstration; default: digits")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="its options, which qsd demo KIND --help shows")
    kind = args[0] if args and not args[0].startswith("-") else "digits"
    if kind not in kinds or args[:1] in (["--help"], ["-h"]):
        parser.parse_args(args)
    return kinds[kind](kind, args[1:] if args[:1] == [kind] else args)


def _digits(kind: str, args: list[str]) -> int:
    parser = program.Parser(prog=f"qsd demo {kind}", description="Train, test and convert a classifier of digits.")
    parser.add_argument("--max-images", type=whole(1), help="number of test images to convert on; the default is all")
    parser.add_argument("--pretrained", action="store_true", help="load the trained network of the package instead of "
                        "training one, classify the test digits, and show the spikes of one of them")  # fmt: skip
    parser.add_argument("options", nargs="*", help="further options of qsd fit and qsd test, after --")
    options = parser.parse_args(args)
    if options.pretrained:
        from qsd.commands.demo.pretrained import show

        return show(options.max_images)
    from qsd.commands.demo.digits import run

    return run(kind, options.max_images, options.options)


def _dense(kind: str, args: list[str]) -> int:
    parser = program.Parser(
        prog=f"qsd demo {kind}", description="Train and test on scenes of digits, draw predictions."
    )
    parser.add_argument("--pretraining", nargs="*", default=[], metavar="OPTION",
                        help="further options of qsd fit for the pretraining of the backbone")  # fmt: skip
    parser.add_argument("--cfg-options", nargs="*", default=[], metavar="KEY=VALUE",
                        help="settings of the configuration to override in training and test")  # fmt: skip
    options = parser.parse_args(args)
    from qsd.commands.demo.dense import run
    from qsd.commands.demo.scenes import make_scenes

    if not _SCENES.is_dir():
        make_scenes(_SCENES)
    return run(kind, _SCENES, options.pretraining, options.cfg_options)


def _scenes(_kind: str, args: list[str]) -> int:
    parser = program.Parser(prog="qsd demo scenes", description="Compose scenes of digits on photographs.")
    parser.add_argument("folder", type=Path, nargs="?", default=_SCENES, help="folder to write; it must not exist")
    parser.add_argument("--scenes", type=whole(1), nargs=3, default=(2000, 200, 400), metavar=("TRAIN", "VAL", "TEST"),
                        help="number of scenes of each part")  # fmt: skip
    parser.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0, help="seed of all random choices")
    options = parser.parse_args(args)
    from qsd.commands.demo.scenes import make_scenes

    make_scenes(options.folder, tuple(options.scenes), options.seed)
    return 0
