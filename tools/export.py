"""Write the network of a checkpoint for other programs: ONNX in floats or in integers, packed, or a part of it in NIR.

python tools/export.py CHECKPOINT --format onnx-int8 --config configs/digits.yaml
python tools/export.py CHECKPOINT --format packed --data ImageFolderData --data.root DIR
python tools/export.py CHECKPOINT --format nir --part stem --config configs/digits.yaml
"""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from qsd import QsdError, measure_energy, to_spike_driven
from qsd.data import ImageData
from qsd.data.arguments import add_data_arguments, data_from_arguments, parse_with_config
from qsd.export import FORMATS, ExportOptions, Format
from qsd.packing import image_notes
from qsd.spiking.batches import image_batches
from qsd.tasks import load_trained

INNER: dict[str, Any] = {"all": True, "none": False, "rep": "rep", "sep": "sep"}


def build_parser(config: str | None) -> ArgumentParser:
    parser = ArgumentParser(prog="export", description=__doc__.splitlines()[0], exit_on_error=False)
    parser.add_argument("checkpoint", help=".ckpt of a training, or a packed .safetensors file")
    parser.add_argument("--format", choices=tuple(FORMATS), default="onnx-int8", help="of the file")
    parser.add_argument("--out", help="file to write; the default is the checkpoint's name with another ending")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--config", help="configuration of a training, whose data is taken")
    add_data_arguments(parser, config)
    parser.add_argument("--images", type=int, default=200, help="validation images that ranges and energy are taken of")
    parser.add_argument("--merged-bits", type=int, help="merge chains of convolutions into kernels of so many bits")
    parser.add_argument("--part", default="", help="module of the network, by its dotted name, that is written (nir)")
    parser.add_argument("--round-inner", choices=tuple(INNER), default="all",
                        help="chains of convolutions whose inner values become integers (onnx-int8)")  # fmt: skip
    return parser


def export(options: Namespace, data: ImageData) -> Path:
    """Write the file.

    Args:
        options: of the command line.
        data: whose validation images are measured, and whose classes and normalisation are noted in the file.

    Raises:
        QsdError: for a file that exists, a checkpoint that cannot be read, and what cannot be exported.
    """
    checkpoint, form = Path(options.checkpoint), FORMATS[options.format]
    target = Path(options.out) if options.out else checkpoint.with_suffix(form.ending)
    if target.exists() and not options.force:
        raise QsdError(f"{target} exists; pass --force to replace it, or another --out.")
    if options.images < 1:
        raise QsdError(f"--images={options.images} is not positive.")
    trained, _ = load_trained(checkpoint)
    if form.parts:
        return export_part(trained.eval(), options.part, target, data, form)
    if options.part:
        raise QsdError(f"--part={options.part} is for --format nir; other formats hold whole networks.")
    spiking = to_spike_driven(trained.eval(), merged_bits=options.merged_bits)
    batches = image_batches(data.whole_part("val"), spiking, options.images, "reading validation images")
    images = [batch for batch, _ in batches]
    energy = measure_energy(spiking, images)
    notes = {**image_notes(data), "energy_mj": energy.total_mj, "energy_images": energy.images}
    form.write(spiking, target, ExportOptions(images, notes, INNER[options.round_inner]))
    return target


def export_part(trained: Any, part: str, target: Path, data: ImageData, form: Format) -> Path:
    """Write a part of a network, in a format that holds parts.

    Args:
        trained: the network.
        part: dotted name of a module, or nothing for the whole network.
        target: file to write.
        data: whose first validation image tells the size.
        form: format of the file.

    Raises:
        QsdError: for an unknown part, and for what the format cannot express.
    """
    modules = dict(trained.named_modules())
    if part not in modules:
        raise QsdError(
            f"--part={part} is no module of the network, such as {', '.join(dict(trained.named_children()))}."
        )
    images, _ = next(iter(data.whole_part("val")))
    form.write(to_spike_driven(modules[part], example=images[:1]), target, ExportOptions(notes=image_notes(data)))
    return target


def main(args: list[str] | None = None) -> int:
    try:
        options = parse_with_config(build_parser, args)
        target = export(options, data_from_arguments(options))
    except (QsdError, ArgumentError, OSError) as error:
        print(f"export: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    use = FORMATS[options.format].use.format(path=target)
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB; use it with {use}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
