"""Tell the classes of images with an exported network: a packed file, or an ONNX file of tools/export.py.

python tools/predict.py IMAGE... --model FILE
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qsd import QsdError, load_packed, measure_energy, to_spike_driven
from qsd.data import BadImage, load_image
from qsd.data.transforms import eval_transform
from qsd.export import read_note
from qsd.packing import read_notes
from qsd.spiking import SpikingNetwork

_REPEATS = 5


class Predictor:
    """An exported network, whatever its format.

    Args:
        path: packed file, or ONNX file with our metadata.

    Raises:
        QsdError: if the file cannot be read, or does not tell how its images are normalised.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise QsdError(f"model {path} does not exist." if not path.exists() else f"{path} is no file.")
        load = self._load_onnx if path.suffix == ".onnx" else self._load_packed
        self.logits: Callable[[Tensor], Tensor]
        self.energy: Callable[[Tensor], float | None]
        self.notes: dict[str, Any]
        load(path)
        missing = [key for key in ("mean", "std", "img_size") if key not in self.notes]
        if missing:
            raise QsdError(f"{path} does not tell the {missing[0]} of its images; write it with tools/export.py.")
        self.class_names = self.notes.get("class_names")
        self.grey = len(self.notes["mean"]) == 1
        self._transform = eval_transform(
            tuple(self.notes["img_size"]),
            self.notes.get("interpolation", "bilinear"),
            self.notes.get("crop_pct", 1.0),
            mean=tuple(self.notes["mean"]),
            std=tuple(self.notes["std"]),
        )

    def _load_packed(self, path: Path) -> None:
        self.notes, network = read_notes(path), load_packed(path)
        spiking = network if isinstance(network, SpikingNetwork) else to_spike_driven(network)
        lossless = all(neuron.delay >= spiking.time_steps - 1 for neuron in spiking.neurons().values())
        self.logits = spiking if lossless else lambda images: spiking.simulate(images).logits
        self.energy = lambda images: measure_energy(spiking, images).total
        self.energy_of = "of the spikes that each image causes"

    def _load_onnx(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise QsdError("running ONNX files needs more packages: pip install 'qsd[export]'.") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of a type of its own
            raise QsdError(f"{path} cannot be read: it is damaged, or no ONNX file.") from error
        header = read_note(session.get_modelmeta().custom_metadata_map, path)
        self.notes = {**header["notes"], "img_size": header["image"][1:]}
        self.logits = lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        # Spikes of an integer network are not seen from outside: what the export measured.
        noted = self.notes.get("energy_mj", {}).get("integer")
        self.energy_of = "of the integer network, mean of the images of the export"
        self.energy = lambda _: noted

    def read(self, path: str) -> Tensor:
        """An image as the network takes it, ``[1, C, H, W]``.

        Args:
            path: of an image file.

        Raises:
            QsdError: if it cannot be read.
        """
        if not Path(path).is_file():
            raise QsdError(f"image {path} does not exist.")
        image = load_image(path)
        if isinstance(image, BadImage):
            raise QsdError(f"image {path} cannot be read: {image.reason}")
        return self._transform(image.convert("L") if self.grey else image).unsqueeze(0)

    def name(self, label: int) -> str:
        """Of a class.

        Args:
            label: its number.
        """
        return str(label) if self.class_names is None else str(self.class_names[label])


def predict(images: list[str], predictor: Predictor, top: int) -> Table:
    """Classes, times and energies of images, in a table.

    Args:
        images: files.
        predictor: an exported network.
        top: classes to tell of each.
    """
    pictures = [predictor.read(path) for path in images]  # all of them first: a mistake costs no waiting
    table = Table("image", "class", "probability", "ms", "µJ", title="Predictions", title_justify="left")
    table.caption = f"energy: {predictor.energy_of}"
    for path, picture in zip(images, pictures):
        predictor.logits(picture)
        times = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            logits = predictor.logits(picture)
            times.append(time.perf_counter() - start)
        shares, labels = logits[0].softmax(0).topk(min(top, logits.shape[1]))
        energy = predictor.energy(picture)
        names = "\n".join(predictor.name(int(label)) for label in labels)
        percents = "\n".join(f"{100 * share:.1f} %" for share in shares.tolist())
        cost = "" if energy is None else f"{1e3 * energy:.3g}"
        table.add_row(path, names, percents, f"{1e3 * statistics.median(times):.2f}", cost)
    return table


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="packed or ONNX file")
    parser.add_argument("--top", type=int, default=1, help="classes to tell of every image")
    options = parser.parse_args(args)
    try:
        if options.top < 1:
            raise QsdError(f"--top={options.top} is not positive.")
        predictor = Predictor(options.model)
        table = predict(options.images, predictor, options.top)
    except (QsdError, OSError) as error:
        print(f"predict: error: {error}", file=sys.stderr)
        return 2
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
