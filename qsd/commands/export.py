"""Write the network of a checkpoint for other programs: ONNX in floats or in integers, a packed file, NIR, integers, C.

Ranges, widths and energy are measured on validation images, which --config or --data names. Use the file with qsd run.

Examples:
  qsd export CHECKPOINT --format onnx-int8 --config configs/digits.yaml
  qsd export CHECKPOINT --format packed --data ImageFolderData --data.root DIR
  qsd export CHECKPOINT --format nir --part stem --config configs/digits.yaml
  qsd export CHECKPOINT --format integers --out DIR --merged-bits 8 --config configs/digits.yaml
"""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from qsd import measure_energy, program, to_spike_driven
from qsd.commands import openmmlab
from qsd.commands.data import DataParser, add_data_arguments, data_from_arguments, parse_with_config
from qsd.data import ImageData
from qsd.errors import QsdError
from qsd.export import FORMATS, ExportOptions, Format
from qsd.limits import whole
from qsd.packing import image_notes
from qsd.report import MERGES
from qsd.spiking.batches import image_batches
from qsd.tasks import load_trained


def main(args: Sequence[str] | None = None) -> int:
    """Run ``qsd export``.

    Args:
        args: The arguments; ``None`` for those of the process.

    Returns:
        The exit code, as of `qsd.program.run`.
    """
    return program.run("qsd", _command, args)


def _command(args: list[str]) -> None:
    options = parse_with_config(_parser, args)
    target = _export(options)
    use = FORMATS[options.format].use.format(path=target)
    files = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
    print(f"{target}: {sum(path.stat().st_size for path in files) / 1e6:.2f} MB; use it with {use}")


def _parser(config: str | Path | None) -> DataParser:
    parser = DataParser(prog="qsd export", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help=".ckpt of a training, or a packed .safetensors file")
    parser.add_argument("--format", choices=tuple(FORMATS), default="onnx-int8", help="format of the file")
    parser.add_argument(
        "--out", help="file or folder to write; the default is the checkpoint's name with another ending"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--max-images", type=whole(1), default=200, help="number of validation images to "
                        "measure ranges and energy on")  # fmt: skip
    parser.add_argument(
        "--merged-bits", type=whole(2, 16), help="merge chains of convolutions into kernels of this many bits"
    )
    parser.add_argument("--part", default="", help="dotted name of the module that is written (format nir)")
    parser.add_argument("--round-inner", choices=MERGES, default="all", help="chains of convolutions whose "
                        "inner values become integers (format onnx-int8)")  # fmt: skip
    parser.add_argument("--compact", action="store_true", help="weights of 4 bits as words of a dictionary, "
                        "mostly smaller, and for older runtimes too (formats onnx-int8 and onnx-standard)")  # fmt: skip
    integers = parser.add_argument_group("formats integers and c")
    integers.add_argument("--fractional-bits", type=whole(1, 30), help="bits behind the point of running sums; the "
                          "default is the fewest that keep all counts on the images")  # fmt: skip
    integers.add_argument("--inner-bits", type=whole(4, 24), default=24, help="most bits of values between the "
                          "convolutions of a chain that is not merged")  # fmt: skip
    integers.add_argument("--vectors", type=whole(0), default=4, help="number of images whose spikes are test vectors")
    add_data_arguments(parser, config)
    return parser


def _export(options: Namespace) -> Path:
    """Write the file.

    Args:
        options: The parsed options.

    Returns:
        The path of the file.

    Raises:
        QsdError: If the file exists, the checkpoint cannot be read, or the network cannot be exported.
    """
    if openmmlab.is_checkpoint(options.checkpoint):
        raise QsdError(
            f"{options.checkpoint} is no checkpoint of a classifier; qsd convert writes the packed file of a detector."
        )
    checkpoint, form = Path(options.checkpoint), FORMATS[options.format]
    target = Path(options.out) if options.out else checkpoint.with_suffix(form.ending)
    program.refuse_existing([target], options.force)
    data = data_from_arguments(options)
    trained, _ = load_trained(checkpoint)
    if form.parts:
        _export_part(trained.eval(), options.part, target, data, form)
        return target
    if options.part:
        raise QsdError(f"--part={options.part} is for --format nir; other formats hold whole networks.")
    trained = trained.double() if form.exact else trained
    spiking = to_spike_driven(trained.eval(), merged_bits=options.merged_bits)
    batches = image_batches(data.whole_part("val"), spiking, options.max_images, "reading validation images")
    images = [batch for batch, _ in batches]
    energy = measure_energy(spiking, images)
    notes = {**image_notes(data), "energy_mj": energy.total_mj, "energy_images": energy.images}
    widths = (options.fractional_bits, options.inner_bits, options.vectors, options.compact)
    form.write(spiking, target, ExportOptions(images, notes, options.round_inner, *widths))
    return target


def _export_part(trained: Any, part: str, target: Path, data: ImageData, form: Format) -> None:
    """Write a part of a network, in a format that holds parts.

    Args:
        trained: The network.
        part: The dotted name of a module, or nothing for the whole network.
        target: The file to write.
        data: The data whose first validation image gives the size.
        form: The format of the file.

    Raises:
        QsdError: If the part is unknown, or the format cannot express it.
    """
    modules = dict(trained.named_modules())
    if part not in modules:
        raise QsdError(
            f"--part={part} is no module of the network, such as {', '.join(dict(trained.named_children()))}."
        )
    images, _ = next(iter(data.whole_part("val")))
    form.write(to_spike_driven(modules[part], example=images[:1]), target, ExportOptions(notes=image_notes(data)))
