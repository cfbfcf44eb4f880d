"""Convert a checkpoint to binary spikes, verify the result on images, and write its report.

A checkpoint ``.pth`` of a detector or segmenter holds its configuration, which names the images. For a classifier
name them with --config or --data.

Examples:
  qsd convert CHECKPOINT --config configs/digits.yaml --out converted
  qsd convert CHECKPOINT --data ImageFolderData --data.root DIR --delays
  qsd convert DETECTOR.pth --part test --out converted
"""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from qsd import program, report, to_spike_driven
from qsd.commands import openmmlab
from qsd.commands.data import (
    PARTS,
    DataParser,
    add_data_arguments,
    add_device_argument,
    data_from_arguments,
    parse_with_config,
)
from qsd.energy import PRESETS
from qsd.errors import QsdError
from qsd.packing import image_notes
from qsd.spiking import calibrate_delays
from qsd.spiking.codes import CODES
from qsd.tasks import load_trained


def main(args: Sequence[str] | None = None) -> int:
    """Run ``qsd convert``.

    Args:
        args: The arguments; ``None`` for those of the process.

    Returns:
        The exit code, as of `qsd.program.run`.
    """
    return program.run("qsd", _command, args)


def _command(args: list[str]) -> None:
    options = parse_with_config(_parser, args)
    written = [Path(options.out, name) for name in report.FILES]
    program.refuse_existing([*written, *([Path(options.csv)] if options.csv else [])], options.force)
    _refuse_contradictions(options)
    record = _convert_dense(options) if openmmlab.is_checkpoint(options.checkpoint) else _convert_classifier(options)
    console = Console()
    if options.delays:
        console.print(_delay_table(record))
    console.print(report.summary(record))
    print(f"report: {Path(options.out) / 'report.html'}")
    if options.csv:
        report.write_csv(record, options.csv)
        print(f"operations and bits: {options.csv}")


def _parser(config: str | Path | None) -> DataParser:
    parser = DataParser(prog="qsd convert", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help=".ckpt or .pth of a training, or a packed .safetensors file of a classifier")
    parser.add_argument("--out", default="converted", help="folder for the packed network, the record and the report")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier conversion")
    parser.add_argument("--part", choices=tuple(PARTS), default="val", help="part of the data to measure on")
    parser.add_argument("--merge", choices=report.MERGES, default="all",
                        help="chains of convolutions that become one convolution each")  # fmt: skip
    parser.add_argument("--merged-bits", type=int, help="bits of merged kernels, which are then not lossless")
    parser.add_argument("--code", choices=CODES, default="unary", help="spikes of a count n: n of them in T steps, or "
                        "its binary digits in ceil(log2(T + 1)) steps")  # fmt: skip
    parser.add_argument("--delay", type=int, help="delay of every neuron; the default T - 1 is lossless")
    parser.add_argument("--preset", default="fp32", help=f"energy prices: {', '.join(PRESETS)}; fp32 are the papers'")
    parser.add_argument("--prices", metavar="FILE", help="YAML file with prices of one's own instead of a preset")
    parser.add_argument("--csv", metavar="FILE", help="also write operations and bits by layer to this file")
    parser.add_argument("--max-images", type=int, help="number of images to measure on; the default is all")
    parser.add_argument("--step-images", type=int, help="number of images that are also stepped through time; "
                        "the default is 100 for classifiers, 8 for others")  # fmt: skip
    parser.add_argument("--leave-out", nargs="+", choices=report.STAGES, default=[], help="measurements to leave out")
    add_device_argument(parser)
    classifiers = parser.add_argument_group("classifiers")
    classifiers.add_argument("--calibrate", type=float, metavar="MAX_DROP", help="choose small delays by layer that "
                             "cost at most this share of the accuracy on validation images")  # fmt: skip
    classifiers.add_argument("--delays", action="store_true", help="print the accuracy for every delay up to T - 1")
    classifiers.add_argument("--float-accuracy", type=float, help="accuracy of the float twin, a share, for the report")
    classifiers.add_argument("--raster", help="neuron whose spikes are drawn")
    openmmlab.add_config_options(parser.add_argument_group("detectors and segmenters"))
    add_data_arguments(parser, config)
    return parser


def _refuse_contradictions(options: Namespace) -> None:
    if options.csv and "energy" in options.leave_out:
        raise QsdError("--csv and --leave-out energy exclude each other; drop one.")
    if options.delays and "delays" in options.leave_out:
        raise QsdError("--delays and --leave-out delays exclude each other; drop one.")
    if options.calibrate is not None and options.delay is not None:
        raise QsdError("--calibrate and --delay exclude each other; drop one.")
    if options.code != "unary" and (options.delays or options.calibrate is not None):
        option = "--delays" if options.delays else "--calibrate"
        raise QsdError(f"{option} is about early firing, which --code {options.code} does not have; drop one.")


def _conversion_options(options: Namespace, defaults: Mapping[str, Any]) -> report.ConversionOptions:
    """The options of a conversion.

    Args:
        options: The parsed options.
        defaults: The values of fields whose options are not given, with the stages that the kind of network has.
    """
    names = ("code", "merge", "merged_bits", "delay", "preset", "prices", "max_images", "step_images", "float_accuracy",
             "raster")  # fmt: skip
    given = {name: options[name] for name in names if options[name] is not None}
    chosen = [stage for stage in defaults["stages"] if stage not in options.leave_out]
    return report.ConversionOptions(**{**defaults, **given, "stages": chosen})


def _convert_classifier(options: Namespace) -> report.Record:
    if options.cfg_options:
        raise QsdError("--cfg-options is for checkpoints of detectors and segmenters; drop it.")
    chosen = _conversion_options(options, {"stages": report.STAGES})
    data = data_from_arguments(options)
    trained, name = load_trained(options.checkpoint)
    trained = trained.to(options.device)
    if options.calibrate is not None:
        spiking = to_spike_driven(trained, None, chosen.merge, options.merged_bits)
        calibration = calibrate_delays(spiking, data.whole_part("val"), options.calibrate, options.max_images)
        Console().print(calibration.table())
        chosen = replace(chosen, delay=calibration.delays)
    origin = report.Origin(name, options.checkpoint, f"{PARTS[options.part]} images of {type(data).__name__}")
    images = data.whole_part(options.part)
    # With size and normalisation of the images, so that `qsd run` takes the packed file.
    return report.write_conversion(trained, images, options.out, chosen, origin, image_notes(data))


def _convert_dense(options: Namespace) -> report.Record:
    """Convert a detector or segmenter."""
    for name in ("calibrate", "delays", "float_accuracy", "raster", "data"):
        if options[name]:
            raise QsdError(f"--{name.replace('_', '-')} is for classifiers; drop it.")
    from qsd.mm.loading import load_model
    from qsd.mm.spiking import ImageSubset, load_part, write_model
    from qsd.mm.spiking.measuring import DEFAULTS

    chosen = _conversion_options(options, DEFAULTS)
    overrides = openmmlab.parse_config_options(options.cfg_options)
    model, config = load_model(options.checkpoint, options.device, overrides)
    dataset, evaluator = load_part(config, options.part)
    origin = report.Origin(type(model).__name__, options.checkpoint, f"{PARTS[options.part]} images")
    return write_model(model, ImageSubset(dataset), options.out, chosen, origin, config.pretty_text, evaluator)


def _delay_table(record: report.Record) -> Table:
    """Accuracy over the delay, as in Table 4 of the CSDformer paper."""
    delays = record.delays
    assert delays is not None
    title = f"Delay of every neuron, {delays.images} images stepped spike by spike"
    table = Table("delay", "accuracy", "same class", "latency", "interval", title=title, title_justify="left")
    for row in delays.rows:
        shares = [f"{100 * share:.2f} %" for share in (row.accuracy, row.class_agreement)]
        table.add_row(str(row.delay), *shares, f"{row.latency} steps", f"{row.interval} steps")
    table.add_row("trained", f"{100 * delays.quantized_accuracy:.2f} %")
    return table
