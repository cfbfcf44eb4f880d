"""An exported classifier as a function of images, whatever the format of its file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsd import load_packed, measure_energy, to_spike_driven
from qsd.data import BadImage, load_image
from qsd.data.transforms import eval_transform
from qsd.errors import QsdError
from qsd.export import read_note
from qsd.image_notes import read_image_notes
from qsd.packing import read_notes
from qsd.reading import read_onnx, regular_file
from qsd.spiking import SpikingNetwork


class Predictor:
    """An exported network.

    Args:
        path: A packed file, or an ONNX file with metadata of `qsd.export`.

    Attributes:
        logits: Gives the logits ``[B, classes]`` of images ``[B, C, H, W]``.
        energy: Gives the energy of images in mJ, or ``None`` if it is unknown.
        energy_of: What the energy was measured on, in words.
        class_names: The names of the classes, or ``None``.
        network: The network of spikes; ``None`` for an ONNX file.

    Raises:
        QsdError: If the file cannot be read, or does not hold the size and normalisation of its images.
    """

    def __init__(self, path: Path) -> None:
        regular_file(path, "model")
        load = self._load_onnx if path.suffix == ".onnx" else self._load_packed
        self.logits: Callable[[Tensor], Tensor]
        self.energy: Callable[[Tensor], float | None]
        self.energy_of: str
        self.network: SpikingNetwork | None = None
        self._notes: dict[str, Any]
        load(path)
        facts = read_image_notes(self._notes, path)
        # An integer network does not show its spikes; the export measured its energy.
        self._noted_energy = facts.energy_mj.get("integer")
        self.class_names = facts.class_names
        self._grey = len(facts.mean) == 1
        height, width = facts.img_size
        self._transform = eval_transform(
            (height, width), facts.interpolation, facts.crop_pct, mean=tuple(facts.mean), std=tuple(facts.std)
        )

    def _load_packed(self, path: Path) -> None:
        self._notes = read_notes(path)
        if "config" in self._notes:
            raise QsdError(f"{path} holds a detector or segmenter; give the checkpoint .pth of its training instead.")
        network = load_packed(path)
        spiking = network if isinstance(network, SpikingNetwork) else to_spike_driven(network)
        self.network, self.logits = spiking, spiking.evaluate
        self.energy = lambda images: measure_energy(spiking, images).total
        self.energy_of = "spikes of each image"

    def _load_onnx(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise QsdError("running ONNX files needs more packages: pip install 'qsd[export]'.") from error
        content, metadata = read_onnx(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common public base class
            raise QsdError(f"{path} cannot be read: it is damaged, or no ONNX file.") from error
        header = read_note(metadata, path)
        self._notes = {**header["notes"], "img_size": header["image"][1:]}
        self.logits = lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        self.energy_of = "mean of the integer network on the images of the export"
        self.energy = lambda _: self._noted_energy

    def read(self, path: str) -> Tensor:
        """Read an image as the network takes it.

        Args:
            path: The image file.

        Returns:
            The image ``[1, C, H, W]``.

        Raises:
            QsdError: If the file cannot be read.
        """
        regular_file(path, "image")
        image = load_image(path, self._notes.get("exif_orientation", "upright"))
        if isinstance(image, BadImage):
            raise QsdError(f"image {path} cannot be read: {image.reason}")
        return self._transform(image.convert("L") if self._grey else image).unsqueeze(0)

    def name(self, label: int) -> str:
        """The name of a class.

        Args:
            label: The number of the class.
        """
        return (
            str(label) if self.class_names is None or label >= len(self.class_names) else str(self.class_names[label])
        )
