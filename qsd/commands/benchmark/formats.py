"""Images per second of the formats that images are kept in, beside a plain loop over the same bytes."""

import io
import tarfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from qsd.commands.benchmark.loading import write_images
from qsd.commands.benchmark.settings import Settings
from qsd.data import ImageDataset, ImageFolderData, PhotographData, ReaderData
from qsd.data.dataset import ImageSource, Transform, seed_generators

TARGET = 0.9  # of the images per second of the plain loop


def formats(settings: Settings) -> dict[str, Any]:
    """Measure reading and augmentation alone, in one loading worker, for each format.

    The plain loop decodes the same bytes, which it has in memory, and applies the same augmentation, with the same
    random choices. Both take turns, image by image.

    Args:
        settings: The settings of the benchmark.

    Returns:
        Images per second, those of the plain loop, and the ratio, by format.
    """
    results: dict[str, Any] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "folders", settings.rounds * settings.batch_size)
        files = sorted((folder / "folders" / "train").rglob("*.jpg"))
        for kind, (data, contents) in _stores(folder, files, settings).items():
            source, transform = data.load_part("train"), data.train_transform()
            turns = DataLoader(_Turns(source, transform, contents, settings.rounds), batch_size=None, num_workers=1)
            ours, plain = next(iter(turns))
            ratios = [b / a for a, b in zip(ours, plain)]
            results[kind] = {
                "images_per_second": len(contents) / median(ours),
                "plain_images_per_second": len(contents) / median(plain),
                "ratio": median(ratios),
                "target": TARGET,
            }
    return results


def show_formats(console: Console, results: dict[str, Any]) -> None:
    """Print the table.

    Args:
        console: The console to print on.
        results: The results of `formats`.
    """
    table = Table("format", "images/s", "plain loop", "ratio", "target", title="one loading worker")
    for kind, row in results.items():
        speeds = (f"{row[key]:.1f}" for key in ("images_per_second", "plain_images_per_second"))
        table.add_row(kind, *speeds, f"{row['ratio']:.3f}", f"≥ {row['target']}")
    console.print(table)


def _stores(folder: Path, files: list[Path], settings: Settings) -> dict[str, tuple[PhotographData, list[bytes]]]:
    """The same images in each format, with their contents in memory."""
    contents = [file.read_bytes() for file in files]
    labels = [int(file.parent.name) for file in files]
    options: dict[str, Any] = {"img_size": settings.img_size, "num_workers": 0}
    stores: dict[str, tuple[PhotographData, list[bytes]]] = {
        "folders": (ImageFolderData(str(folder / "folders"), **options), contents)
    }
    if find_spec("datasets") is not None:
        _write_parquet(folder / "parquet", contents, labels)
        stores["parquet"] = (ReaderData("hfds/", str(folder / "parquet"), **options), contents)
    _write_shards(folder / "shards", contents, labels)
    stores["shards"] = (ReaderData("wds/", str(folder / "shards"), **options), contents)
    return stores


def _write_parquet(folder: Path, contents: list[bytes], labels: list[int]) -> None:
    import datasets

    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["0", "1"])})
    images = [{"bytes": content, "path": None} for content in contents]
    dataset = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    dataset.to_parquet(folder / "train-00000-of-00001.parquet")


def _write_shards(folder: Path, contents: list[bytes], labels: list[int]) -> None:
    folder.mkdir()
    half = -(-len(contents) // 2)
    for shard in range(2):
        with tarfile.open(folder / f"images-train-{shard:04d}.tar", "w") as archive:
            for index in range(shard * half, min(len(contents), (shard + 1) * half)):
                for ending, content in (("jpg", contents[index]), ("cls", str(labels[index]).encode())):
                    entry = tarfile.TarInfo(f"{index:06d}.{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


class _Turns(Dataset[tuple[list[float], list[float]]]):
    """Seconds of each round over all images, of the data set and of the plain loop, with the same random choices.

    They are its one item, so that a loading worker measures them.

    Args:
        source: The images.
        transform: Their augmentation.
        contents: The same images, as bytes.
        rounds: Number of rounds.
    """

    def __init__(self, source: ImageSource, transform: Transform, contents: list[bytes], rounds: int) -> None:
        self._dataset = ImageDataset(source, transform, seed=0)
        self._transform, self._contents, self._rounds = transform, contents, rounds

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> tuple[list[float], list[float]]:
        runs: list[Callable[[int, int], float]] = [self._ours, self._plain]
        seconds: tuple[list[float], list[float]] = [], []
        for epoch in range(self._rounds + 1):  # the first round warms up
            sums = [0.0, 0.0]
            for index in range(len(self._contents)):
                for number in (0, 1) if (epoch + index) % 2 else (1, 0):
                    sums[number] += runs[number](epoch, index)
            for found, total in zip(seconds, sums):
                found.append(total)
        return seconds[0][1:], seconds[1][1:]

    def _ours(self, epoch: int, index: int) -> float:
        start = time.perf_counter()
        assert self._dataset[(epoch, index)].image is not None
        return time.perf_counter() - start

    def _plain(self, epoch: int, index: int) -> float:
        seed_generators(0, epoch, index)
        start = time.perf_counter()
        self._transform(Image.open(io.BytesIO(self._contents[index])).convert("RGB"))
        return time.perf_counter() - start
