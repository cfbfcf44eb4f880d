"""Convert a trained detector or segmenter to binary spikes, verify it on images, and write its report.

python tools/mm_convert.py runs/digits_det/best_coco_segm_mAP_50_iter_500.pth --part test --out converted
"""

import argparse
import sys
from pathlib import Path

import torch
from mmengine.config import DictAction
from rich.console import Console

from qsd import QsdError, report

try:
    from qsd.mm import command
    from qsd.mm.loading import load_model
    from qsd.mm.spiking import STAGES, ImageSubset, load_part, write_model
except QsdError as error:
    print(f"mm_convert: error: {error}", file=sys.stderr)
    sys.exit(2)

PARTS = {"val": "validation", "test": "test"}


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="of a training; it holds its configuration")
    parser.add_argument("--part", choices=tuple(PARTS), default="val", help="images to measure on")
    parser.add_argument("--out", type=Path, default=Path("converted"), help="folder for the three files")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier conversion")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE",
                        help="override settings of the checkpoint's configuration, such as data_root")  # fmt: skip
    parser.add_argument(
        "--merge", choices=report.MERGES, default="all", help="chains to turn into one convolution each"
    )
    parser.add_argument("--merged-bits", type=int, help="quantize merged kernels to so many bits; not lossless")
    parser.add_argument("--delay", type=int, help="of every neuron; the default T - 1 is lossless")
    parser.add_argument("--preset", default="fp32", help="prices of operations: fp32 (the papers'), fp16, int8")
    parser.add_argument("--max-images", type=int, help="measure on so many images; the default is all")
    parser.add_argument("--step-images", type=int, default=8, help="images that are also stepped through time")
    parser.add_argument("--leave-out", nargs="+", choices=STAGES, default=[], help="do not measure these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    return command.run("mm_convert", _convert, parser, args)


def _convert(options: argparse.Namespace) -> None:
    existing = [options.out / name for name in report.FILES if (options.out / name).exists()]
    if existing and not options.force:
        raise QsdError(f"{existing[0]} exists; pass --force to replace it, or another --out.")
    chosen = report.ConversionOptions(
        merge=options.merge,
        merged_bits=options.merged_bits,
        delay=options.delay,
        preset=options.preset,
        max_images=options.max_images,
        step_images=options.step_images,
        stages=[stage for stage in STAGES if stage not in options.leave_out],
    )
    model, config = load_model(options.checkpoint, options.device, options.cfg_options)
    dataset, evaluator = load_part(config, options.part)
    origin = report.Origin(type(model).__name__, str(options.checkpoint), f"{PARTS[options.part]} images")
    record = write_model(model, ImageSubset(dataset), options.out, chosen, origin, config.pretty_text, evaluator)
    Console().print(report.summary(record))
    print(f"report: {options.out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
