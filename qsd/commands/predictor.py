"""An exported classifier as a function of images, whatever the format of its file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsd import load_packed, measure_energy, to_spike_driven
from qsd.data import BadImage, load_image
from qsd.data.events.frames import Binning, to_tensor
from qsd.data.events.recordings import read_frames
from qsd.data.transforms import eval_transform
from qsd.errors import QsdError
from qsd.export import read_note
from qsd.image_notes import RecordingNotes, read_image_notes
from qsd.packing import read_notes
from qsd.program import one_line
from qsd.reading import read_onnx, regular_file
from qsd.reading.events import event_endings
from qsd.spiking import SpikingNetwork


def read_recording(path: str, facts: RecordingNotes, size: Sequence[int]) -> Tensor:
    """Read a recording of an event camera, and count its events.

    Args:
        path: The file.
        facts: How events become frames.
        size: Height and width of the frames.

    Returns:
        Frames ``[1, F, 2, H, W]``.

    Raises:
        QsdError: If the file cannot be read.
    """
    regular_file(path, "recording")
    (height, width), sensor = size, facts.sensor
    binning = Binning(facts.frames, (height, width), None if sensor is None else (sensor[0], sensor[1]), facts.bin_ms)
    counts = read_frames(path, binning, facts.layout, facts.time_unit, facts.denoise_ms)
    if isinstance(counts, BadImage):
        raise QsdError(f"recording {path} cannot be read: {counts.reason}")
    return to_tensor(counts).unsqueeze(0)


def run_session(session: Any, images: Any) -> Any:
    """Logits of an ONNX file; the frames of recordings run one after another, and their logits are averaged.

    Args:
        session: Session of ONNX Runtime.
        images: Images ``[B, C, H, W]``, or recordings ``[B, F, C, H, W]``, float32.

    Returns:
        Logits ``[B, classes]``, float32.
    """
    inputs = {entry.name: entry.shape for entry in session.get_inputs()}
    if images.ndim == len(inputs["images"]):
        return session.run(["logits"], {"images": images})[0]
    states = {
        name: np.zeros((len(images), *shape[1:]), np.float32) for name, shape in inputs.items() if name != "images"
    }
    following = [f"next.{name.removeprefix('state.')}" for name in states]
    total: Any = 0.0
    for frame in np.moveaxis(images, 1, 0):
        logits, *left = session.run(["logits", *following], {"images": np.ascontiguousarray(frame), **states})
        states, total = dict(zip(states, left)), total + logits
    return total / images.shape[1]


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
        self.class_names, self._exif_orientation = facts.class_names, facts.exif_orientation
        self.logits = self._checked(self.logits, path)
        self._grey, self._recordings = len(facts.mean) == 1, facts.recordings
        height, width = self._size = facts.img_size
        self._transform = eval_transform(
            (height, width), facts.interpolation, facts.crop_pct, mean=tuple(facts.mean), std=tuple(facts.std)
        )

    def _checked(self, run: Callable[[Tensor], Tensor], path: Path) -> Callable[[Tensor], Tensor]:
        """A network whose output has to fit the names of the classes."""

        def logits(images: Tensor) -> Tensor:
            output = run(images)
            names = self.class_names
            if names is not None and output.shape[-1] != len(names):
                raise QsdError(
                    f"{path} names {len(names)} classes, its network has {output.shape[-1]}; write it again."
                )
            return output

        return logits

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

        def run(images: Tensor) -> Tensor:
            try:
                return torch.from_numpy(run_session(session, images.numpy()))
            except Exception as error:  # as above
                shape = "x".join(map(str, images.shape[1:]))
                raise QsdError(f"{path} does not run on images of {shape}: {one_line(error)}.") from error

        self.logits = run
        self.energy_of = "mean of the integer network on the images of the export"
        self.energy = lambda _: self._noted_energy

    def read(self, path: str) -> Tensor:
        """Read an image, or a recording of an event camera, as the network takes it.

        Args:
            path: The file.

        Returns:
            The image ``[1, C, H, W]``, or the recording's frames ``[1, F, 2, H, W]``.

        Raises:
            QsdError: If the file cannot be read.
        """
        if self._recordings is not None:
            return read_recording(path, self._recordings, self._size)
        regular_file(path, "image")
        image = load_image(path, self._exif_orientation)
        if isinstance(image, BadImage):
            hint = ""
            if path.lower().endswith(event_endings()):
                hint = "; for a recording, name a network over frames with --model"
            raise QsdError(f"image {path} cannot be read: {image.reason}{hint}")
        return self._transform(image.convert("L") if self._grey else image).unsqueeze(0)

    def name(self, label: int) -> str:
        """The name of a class.

        Args:
            label: The number of the class.
        """
        return (
            str(label) if self.class_names is None or label >= len(self.class_names) else str(self.class_names[label])
        )
