"""Draw what a trained detector or segmenter sees in images: boxes and masks, or segments.

python tools/mm_predict.py IMAGE... --checkpoint runs/digits_det/best.pth --out DIR
"""

import argparse
import sys
from pathlib import Path

from qsd import QsdError

try:
    from qsd.mm import command
    from qsd.mm.drawing import draw_predictions
except QsdError as error:
    print(f"mm_predict: error: {error}", file=sys.stderr)
    sys.exit(2)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a training; it holds its configuration")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--score", type=float, default=0.3, help="draw boxes of at least this score")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    return command.run("mm_predict", _predict, parser, args)


def _predict(options: argparse.Namespace) -> None:
    written = draw_predictions(options.images, options.checkpoint, options.out, options.score, options.device)
    print(f"{len(written)} pictures in {options.out}")


if __name__ == "__main__":
    sys.exit(main())
