"""Convert a trained checkpoint to binary spikes, verify it on images, and write its report.

python tools/convert.py CHECKPOINT --config configs/digits.yaml --out converted
python tools/convert.py CHECKPOINT --data ImageFolderData --data.root DIR --delays
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from qsd import QsdError, report, to_spike_driven
from qsd.data import ImageData
from qsd.data.arguments import add_data_arguments, data_from_arguments, parse_with_config
from qsd.spiking import calibrate_delays
from qsd.tasks import load_trained

PARTS = {"train": "training", "val": "validation", "test": "test"}


def build_parser(config: str | None) -> ArgumentParser:
    parser = ArgumentParser(prog="convert", description=__doc__.splitlines()[0], exit_on_error=False)
    parser.add_argument("checkpoint", help=".ckpt of a training, or a packed .safetensors file")
    parser.add_argument("--config", help="configuration of a training, whose data is taken")
    add_data_arguments(parser, config)
    parser.add_argument("--part", choices=tuple(PARTS), default="val", help="images to measure on")
    parser.add_argument("--out", default="converted", help="folder for the three files")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier conversion")
    parser.add_argument(
        "--merge", choices=report.MERGES, default="all", help="chains to turn into one convolution each"
    )
    parser.add_argument("--merged-bits", type=int, help="quantize merged kernels to so many bits; not lossless")
    parser.add_argument("--delay", type=int, help="of every neuron; the default T - 1 is lossless")
    parser.add_argument("--calibrate", type=float, metavar="MAX_DROP", help="choose small delays by layer, on "
                        "validation images, that cost at most so much accuracy (a share)")  # fmt: skip
    parser.add_argument("--delays", action="store_true", help="print the accuracy for every delay from 0 to T - 1")
    parser.add_argument("--preset", default="fp32", help="prices of operations: fp32 (the papers'), fp16, int8")
    parser.add_argument("--max-images", type=int, help="measure on so many images; the default is all")
    parser.add_argument("--step-images", type=int, default=100, help="images that are also stepped through time")
    parser.add_argument("--float-accuracy", type=float, help="of the float twin, a share, for the report")
    parser.add_argument("--raster", help="neuron whose spikes are drawn")
    parser.add_argument("--leave-out", nargs="+", choices=report.STAGES, default=[], help="do not measure these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    return parser


def convert(options: Namespace, data: ImageData) -> report.Record:
    """Convert as the options say, and write the three files.

    Args:
        options: of the command line.
        data: where the images come from.

    Raises:
        QsdError: for files that exist, checkpoints that cannot be read, and whatever a conversion refuses.
    """
    folder, checkpoint = Path(options.out), Path(options.checkpoint)
    existing = [folder / name for name in report.FILES if (folder / name).exists()]
    if existing and not options.force:
        raise QsdError(f"{existing[0]} exists; pass --force to replace it, or another --out.")
    if options.delays and "delays" in options.leave_out:
        raise QsdError("--delays and --leave-out delays exclude each other; drop one.")
    if options.calibrate is not None and options.delay is not None:
        raise QsdError("--calibrate and --delay exclude each other; drop one.")
    chosen = report.ConversionOptions(
        merge=options.merge,
        merged_bits=options.merged_bits,
        delay=options.delay,
        preset=options.preset,
        max_images=options.max_images,
        step_images=options.step_images,
        float_accuracy=options.float_accuracy,
        raster=options.raster,
        stages=[stage for stage in report.STAGES if stage not in options.leave_out],
    )
    trained, name = load_trained(checkpoint)
    trained = trained.to(options.device)
    if options.calibrate is not None:
        spiking = to_spike_driven(trained, None, chosen.merge_rule, options.merged_bits)
        calibration = calibrate_delays(spiking, data.whole_part("val"), options.calibrate, options.max_images)
        Console().print(calibration.table())
        chosen = replace(chosen, delay=calibration.delays)
    origin = report.Origin(name, str(checkpoint), f"{PARTS[options.part]} images of {type(data).__name__}")
    return report.write_conversion(trained, data.whole_part(options.part), folder, chosen, origin)


def delay_table(record: report.Record) -> Table:
    """Accuracy over the delay, as in Table 4 of the CSDformer paper."""
    delays = record.delays
    title = f"Delay of every neuron, {delays.images} images stepped spike by spike"
    table = Table("delay", "accuracy", "same class", "latency", "interval", title=title, title_justify="left")
    for row in delays.rows:
        shares = [f"{100 * share:.2f} %" for share in (row.accuracy, row.class_agreement)]
        table.add_row(str(row.delay), *shares, f"{row.latency} steps", f"{row.interval} steps")
    table.add_row("trained", f"{100 * delays.quantized_accuracy:.2f} %")
    return table


def main(args: list[str] | None = None) -> int:
    try:
        options = parse_with_config(build_parser, args)
        record = convert(options, data_from_arguments(options))
    except (QsdError, ArgumentError, OSError) as error:
        print(f"convert: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    console = Console()
    if options.delays:
        console.print(delay_table(record))
    console.print(report.summary(record))
    print(f"report: {Path(options.out) / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
