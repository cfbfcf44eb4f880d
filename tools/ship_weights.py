"""Put the trained weights of a run into the package, under one of timm's tags.

The run is converted anew on nothing: the packed file holds the trained network, the facts about its images, and its
test accuracy, which comes from the record of a test (run.json of qsd test).

Example:
  python tools/ship_weights.py runs/digits/version_0 runs/digits/version_1 digits --data digits
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import instantiate_class

from qsd import save_packed
from qsd.errors import QsdError
from qsd.models.shipped import FOLDER
from qsd.packing import image_notes
from qsd.program import run
from qsd.runs import RunRecord
from qsd.tasks import load_trained

MOST_BYTES = 2_500_000


def main(args: Sequence[str] | None = None) -> int:
    return run("ship_weights", _ship, args)


def _ship(args: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("training", type=Path, help="folder of the training")
    parser.add_argument("test", type=Path, help="folder of its test")
    parser.add_argument("tag", help="the tag, such as digits")
    parser.add_argument("--data", required=True, help="the data set in words")
    parser.add_argument("--recipe", help="the configuration, for the notes")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the weights")
    options = parser.parse_args(args)
    target = ship(options.training, options.test, options.tag, options.data, options.recipe, options.folder)
    print(f"{target}: {target.stat().st_size / 1e3:.0f} kB")


def ship(training: Path, test: Path, tag: str, data: str, recipe: str | None = None, folder: Path = FOLDER) -> Path:
    fit, tested = RunRecord.read(training / "run.json"), RunRecord.read(test / "run.json")
    if tested.stage != "test" or (tested.model, tested.parameters) != (fit.model, fit.parameters):
        raise QsdError(f"{test} is no test of the network that {training} has trained.")
    model, _ = load_trained(training / (fit.best or "checkpoints/best.ckpt"))
    module: Any = instantiate_class((), yaml.safe_load((training / "config.yaml").read_text())["data"])
    module.setup("test")  # the mean of digits is known when they are read
    module.load_part("train")
    count = tested.images["test"]
    notes = {
        **image_notes(module),
        "data": data,
        "accuracy": round(tested.metrics["test/accuracy"] * count) / count,  # the metric is a 32-bit number
        "test_images": count,
        "recipe": recipe,
        "seed": fit.seed,
        "versions": fit.versions,
    }
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{fit.model}.{tag}.safetensors"
    save_packed(model.eval(), target, notes)
    if target.stat().st_size > MOST_BYTES:
        target.unlink()
        raise QsdError(f"the weights of {fit.model} need more than {MOST_BYTES / 1e6:.1f} MB.")
    return target


if __name__ == "__main__":
    raise SystemExit(main())
