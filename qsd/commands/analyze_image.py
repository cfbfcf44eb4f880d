"""Pictures of where a network fires for one image: the part of ``qsd analyze`` with ``--image``."""

import json
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from torch import Tensor

from qsd import program, to_spike_driven
from qsd.commands import openmmlab
from qsd.commands.data import data_from_arguments
from qsd.commands.predictor import Predictor, read_recording
from qsd.data import BadImage, load_image
from qsd.data.transforms import eval_transform
from qsd.errors import QsdError
from qsd.image_notes import read_image_notes
from qsd.packing import image_notes
from qsd.reading import regular_file
from qsd.report.activity import FILES, write_activity
from qsd.spiking import SpikingNetwork
from qsd.spiking.activity import measure_activity
from qsd.tasks import load_trained


def analyze_image(options: Namespace) -> list[Path]:
    """Draw where a network fires.

    Args:
        options: The parsed options.

    Returns:
        The files that were written.

    Raises:
        QsdError: If the network or the image cannot be read, or a file exists.
    """
    folder = Path(options.out)
    program.refuse_existing((folder / name for name in FILES), options.force)
    (path, *others) = options.checkpoints
    if others:
        raise QsdError(f"{1 + len(others)} files with --image: one network is drawn at a time.")
    regular_file(options.image, "image")
    spiking, image, name = _load(path, options)
    facts = {"model": name, "image": Path(options.image).name, "time_steps": spiking.time_steps}
    return write_activity(measure_activity(spiking, image), image[0], folder, facts)


def _load(path: str, options: Namespace) -> tuple[SpikingNetwork, Tensor, str]:
    """The converted network, its input ``[1, C, H, W]`` and its name."""
    if openmmlab.is_checkpoint(path):
        from qsd.mm.spiking.activity import dense_segment

        return dense_segment(path, options.image, options.device)
    if path.endswith(".safetensors"):
        predictor = Predictor(Path(path))
        if predictor.network is None:
            raise QsdError(f"{path} holds no network of spikes; give a packed file or a checkpoint.")
        return predictor.network, predictor.read(options.image), Path(path).name
    data: Any = data_from_arguments(options)
    if getattr(data, "mean", None) is None:
        data.setup("validate")  # Some data sets measure their statistics.
    notes = json.loads(json.dumps(image_notes(data)))  # As a packed file would hold them.
    facts = read_image_notes(notes, path)
    trained, name = load_trained(path)
    if facts.recordings is not None:
        frames = read_recording(options.image, facts.recordings, facts.img_size)
        return to_spike_driven(trained.to(options.device)), frames.to(options.device), name
    found = load_image(options.image, getattr(data, "exif_orientation", "upright"))
    if isinstance(found, BadImage):
        raise QsdError(f"image {options.image} cannot be read: {found.reason}")
    height, width = facts.img_size
    transform = eval_transform(
        (height, width), facts.interpolation, facts.crop_pct, mean=tuple(facts.mean), std=tuple(facts.std)
    )
    image = transform(found.convert("L") if len(facts.mean) == 1 else found).unsqueeze(0)
    return to_spike_driven(trained.to(options.device)), image.to(options.device), name
