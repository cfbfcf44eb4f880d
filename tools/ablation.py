"""An ablation of QSD-Transformer on few digits: binary or multi-level spikes, with and without distillation.

python tools/ablation.py

Every combination of T = 1 and T = 4, without and with distillation, and of 4, 3 and 2 weight bits is trained with
several seeds; a seed also chooses the training images. The teacher, a float twin, was trained on the same images. The
best checkpoint of a network is chosen on validation images; the test images are evaluated once, at the end. A second
call goes on where the first one stopped.
"""

import itertools
import json
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qsd import program
from qsd.errors import QsdError
from qsd.files import replacing

VARIANTS = {
    (1, False): "binary spikes (T = 1)",
    (1, True): "binary spikes, distilled",
    (4, False): "multi-level spikes (T = 4)",
    (4, True): "multi-level spikes, distilled",
}
SIZES = {"embed_dims": (16, 32, 64, 80), "depth": 4, "layer_scale": 0.1, "strides": (2, 1, 1, 2, 1)}


@dataclass(frozen=True)
class Settings:
    """The settings that all trainings share; a folder holds results of one choice of them.

    Attributes:
        images: Number of training images.
        epochs: Epochs of each training.
        batch_size: Images per step.
        base_lr: Learning rate of students, for 256 images.
        teacher_lr: Learning rate of teachers, for 256 images.
        attention_weight: Weight of the distillation of attention.
        logits_weight: Weight of the distillation of logits.
    """

    images: int = 200
    epochs: int = 75
    batch_size: int = 50
    base_lr: float = 9.6e-2
    teacher_lr: float = 1.6e-2
    attention_weight: float = 0.03
    logits_weight: float = 1.0


@dataclass(frozen=True)
class Run:
    """One training. A teacher has no time steps and no weight bits.

    Attributes:
        seed: Seed of weights, order, augmentation and the choice of training images.
        time_steps: T, or ``None`` for a teacher.
        weight_bits: Bits of the weights, or ``None`` for a teacher.
        distilled: Whether the teacher of the same seed is used.
    """

    seed: int
    time_steps: int | None = None
    weight_bits: int | None = None
    distilled: bool = False

    @property
    def name(self) -> str:
        """The name of the files of the training."""
        if self.time_steps is None:
            return f"teacher-s{self.seed}"
        return f"t{self.time_steps}-w{self.weight_bits}{'-distilled' if self.distilled else ''}-s{self.seed}"


def train(run: Run, settings: Settings, folder: Path) -> dict[str, Any]:
    """Train and test one network, and then write its result to a file of its own.

    Args:
        run: The training.
        settings: The settings of all trainings.
        folder: The folder of results and of the teachers' checkpoints.

    Returns:
        The result: accuracies on validation and test images.
    """
    import lightning as L  # here, because every worker imports this file
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    from qsd.callbacks import Distillation
    from qsd.data import DigitsData
    from qsd.tasks import ClassificationTask

    L.seed_everything(run.seed, verbose=False)
    is_teacher = run.time_steps is None
    task = ClassificationTask(
        "qsd_tiny_ann" if is_teacher else "qsd_tiny",
        SIZES if is_teacher else {**SIZES, "time_steps": run.time_steps, "weight_bits": run.weight_bits},
        optimizer="adamw",
        base_lr=settings.teacher_lr if is_teacher else settings.base_lr,
        warmup_epochs=settings.epochs / 10,
    )
    data = DigitsData(16, settings.batch_size, train_images=settings.images, train_subset=run.seed)
    checkpoint = ModelCheckpoint(
        folder, run.name, monitor="val/loss", mode="min", save_weights_only=True, enable_version_counter=False
    )
    callbacks = [EMAWeightAveraging(decay=0.95, use_buffers=True), checkpoint]
    if run.distilled:
        teacher = folder / f"{Run(run.seed).name}.ckpt"
        callbacks.append(
            Distillation(str(teacher), attention_weight=settings.attention_weight, logits_weight=settings.logits_weight)
        )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=settings.epochs,
        check_val_every_n_epoch=max(1, settings.epochs // 20),
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, data)
    result: dict[str, Any] = asdict(run)
    for part, evaluate in (("val", trainer.validate), ("test", trainer.test)):
        metrics = evaluate(task, data, ckpt_path=checkpoint.best_model_path, verbose=False)[0]
        result[part] = metrics[f"{part}/accuracy"]
    if not is_teacher:
        Path(checkpoint.best_model_path).unlink()
    with replacing(folder / f"{run.name}.json") as partial:
        partial.write_text(json.dumps(result))
    return result


def prepare_worker() -> None:
    """Use one thread: several processes use the cores better than several threads of one process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@contextmanager
def pool_of(workers: int) -> Iterator[Any]:
    """An executor for trainings: a pool of processes, or this process for 0 workers."""
    if workers > 0:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=prepare_worker) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return

    class Here:
        @staticmethod
        def submit(function: Any, *args: Any) -> "Future[Any]":
            future: Future[Any] = Future()
            future.set_result(function(*args))
            return future

    yield Here


def run_all(runs: list[Run], settings: Settings, folder: Path, workers: int) -> list[dict[str, Any]]:
    """Run the trainings that have no result yet, teachers first, and return all results.

    Args:
        runs: The trainings of students.
        settings: The settings of all trainings.
        folder: The folder of the results.
        workers: The number of processes; 0 trains in this one.
    """
    teachers = [Run(seed) for seed in sorted({run.seed for run in runs if run.distilled})]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        shown = progress.add_task("trainings", total=len(teachers) + len(runs))
        with pool_of(workers) as pool:
            for group in (teachers, runs):  # a student needs its teacher
                missing = [run for run in group if not (folder / f"{run.name}.json").exists()]
                progress.advance(shown, len(group) - len(missing))
                for done in as_completed([pool.submit(train, run, settings, folder) for run in missing]):
                    done.result()
                    progress.advance(shown)
    return [json.loads((folder / f"{run.name}.json").read_text()) for run in (*teachers, *runs)]


def table_of(results: list[dict[str, Any]], settings: Settings) -> Table:
    """Test accuracy in percent, mean and deviation over seeds.

    Args:
        results: The results of `run_all`.
        settings: The settings of all trainings.
    """
    bits = sorted({r["weight_bits"] for r in results if r["weight_bits"]}, reverse=True)
    seeds = len({r["seed"] for r in results})
    title = f"Test accuracy in %, {settings.images} training images, mean ± deviation of {seeds} seeds"
    table = Table("", *(f"{b} bits" for b in bits), title=title, title_justify="left")
    for (steps, distilled), name in VARIANTS.items():
        table.add_row(name, *(spread(accuracies(results, steps, b, distilled)) for b in bits))
    for steps in (1, 4):
        gains = [gain(results, (steps, b, False), (steps, b, True)) for b in bits]
        table.add_row(f"gain by distillation, T = {steps}", *(spread(g, sign="+") for g in gains))
    gains = [gain(results, (1, b, False), (4, b, False)) for b in bits]
    table.add_row("gain by levels, not distilled", *(spread(g, sign="+") for g in gains))
    teachers = list(accuracies(results, None, None, False).values())
    if teachers:
        table.add_row("teacher (float twin)", spread(dict(enumerate(teachers))))
    return table


def accuracies(results: list[dict[str, Any]], steps: int | None, bits: int | None, distilled: bool) -> dict[int, float]:
    """Test accuracy in percent by seed.

    Args:
        results: The results of `run_all`.
        steps: T of the networks.
        bits: Bits of their weights.
        distilled: Whether they were distilled.
    """
    wanted = (steps, bits, distilled)
    return {
        r["seed"]: 100 * r["test"] for r in results if (r["time_steps"], r["weight_bits"], r["distilled"]) == wanted
    }


def gain(
    results: list[dict[str, Any]], before: tuple[int, int, bool], after: tuple[int, int, bool]
) -> dict[int, float]:
    """Differences between two variants that were trained on the same images from the same seed.

    Args:
        results: The results of `run_all`.
        before: T, bits and distillation of one variant.
        after: T, bits and distillation of the other.
    """
    old, new = accuracies(results, *before), accuracies(results, *after)
    return {seed: new[seed] - old[seed] for seed in old.keys() & new.keys()}


def spread(values: dict[int, float], sign: str = "") -> str:
    """Mean and deviation over seeds."""
    if not values:
        return ""
    deviation = f" ± {stdev(values.values()):.2f}" if len(values) > 1 else ""
    return f"{mean(values.values()):{sign}.2f}{deviation}"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over bits, a line per variant, with every seed as a point.

    Args:
        results: The results of `run_all`.
        path: The SVG file to write.
    """
    bits = sorted({r["weight_bits"] for r in results if r["weight_bits"]}, reverse=True)
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    styles = zip(VARIANTS.items(), ("#e69f00", "#d55e00", "#56b4e9", "#0072b2"), "osD^")
    for offset, (((steps, distilled), name), colour, marker) in enumerate(styles):
        places = [i + (offset - 1.5) * 0.08 for i in range(len(bits))]
        values = [list(accuracies(results, steps, b, distilled).values()) for b in bits]
        for place, found in zip(places, values):
            axes.plot([place] * len(found), found, marker, color=colour, alpha=0.35, markersize=3)
        means = [mean(found) if found else float("nan") for found in values]
        axes.plot(places, means, marker, linestyle="-", color=colour, label=name, markersize=5)
    axes.set_xticks(range(len(bits)), [f"{b} bits" for b in bits])
    axes.set_ylabel("test accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    with replacing(path) as partial, mpl.rc_context({"font.size": 9, "svg.hashsalt": "qsd"}):
        figure.savefig(partial, format="svg", metadata={"Date": None})


def check_settings(settings: Settings, folder: Path) -> None:
    """Refuse to mix results of different settings in one folder."""
    path = folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and json.loads(path.read_text()) != asdict(settings):
        raise QsdError(f"{folder} holds results of other settings ({path.name}); choose another --out.")
    with replacing(path) as partial:
        partial.write_text(json.dumps(asdict(settings)))


def main(args: list[str] | None = None) -> int:
    return program.run("ablation", ablate, args)


def ablate(args: list[str]) -> int:
    """Train all variants, and print and plot the results.

    Args:
        args: The arguments.

    Returns:
        The exit code.

    Raises:
        QsdError: If the folder holds results of other settings.
    """
    parser = program.Parser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings of each kind")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], help="bits of the weights")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder for results")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 0 trains in this one")
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = vars(parser.parse_args(args))
    seeds, bits, folder, workers = (options.pop(name) for name in ("seeds", "bits", "out", "workers"))
    del options["traceback"]
    settings = Settings(**options)
    runs = [Run(s, t, b, d) for s, b, (t, d) in itertools.product(range(seeds), bits, VARIANTS)]
    check_settings(settings, folder)
    prepare_worker()
    try:
        results = run_all(runs, settings, folder, workers)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here.", file=sys.stderr)
        return program.INTERRUPTED
    plot(results, folder / "ablation.svg")
    Console().print(table_of(results, settings))
    print(f"plot: {folder / 'ablation.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
