"""Measure side by side what networks cost: inference, training, exported files, waiting for images, growth with size.

python tools/benchmark.py                 # all of it, for qsd_15m at 224 pixels; about an hour on two cores
python tools/benchmark.py inference --quick

All cases of a table take turns in one process, in another order each round; a ratio is the median of the rounds'
ratios. Peak memory is that of a process of its own for each case; kept bytes are what a forward pass keeps for the
backward pass, parameters left out. `loading` trains on JPEG files and tells for how much of the time a step waits for
them. Results go to benchmark.json and benchmark.png.
"""

import argparse
import gc
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import timm
import torch
from benchmark_export import OnnxFile
from benchmark_loading import loading
from benchmark_networks import DirectlyTrained
from benchmark_tables import draw, show, show_loading, show_sizes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

import qsd
from qsd.distillation import AttentionRecorder, Teacher, attention_loss, logits_loss
from qsd.errors import QsdError
from qsd.spiking.conversion import convert

SUITES = ("inference", "training", "export", "loading", "sizes")
SIZES = (128, 192, 256, 384, 512)
MODELS = ("qsd_8m", "qsd_15m", "qsd_31m", "qsd_55m")
PAUSE = 0.1  # seconds before each turn: for so long do the idle threads of the last one keep a core busy


@dataclass
class Case:
    """Something to measure.

    Attributes:
        name: in tables.
        network: builds it.
        job: makes of the network what is to be timed.
        versus: cases that its time is divided by, and the target of the ratio, if there is one.
    """

    name: str
    network: Callable[[], Any]
    job: Callable[[Any], Callable[[], Any]]
    versus: dict[str, float | None] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


# -- the networks -----------------------------------------------------------------------------------------------------


def trained_like(model: nn.Module, images: Tensor) -> nn.Module:
    """Give a fresh model batch statistics of its own, so that its neurons fire; in evaluation mode."""
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(images)
    return model.eval()


# -- the cases --------------------------------------------------------------------------------------------------------


def inference_cases(options: argparse.Namespace) -> list[Case]:
    """Evaluation of the trained network and of its converted forms, the images in channels-last layout."""
    images = options.images()

    @cache
    def trained() -> nn.Module:
        return trained_like(options.model(), images)

    @cache
    def spiking(merge: bool) -> qsd.SpikingNetwork:
        return convert(trained(), None, merge, None, None, check=False)

    def evaluate(network: nn.Module) -> Callable[[], Any]:
        return torch.no_grad()(lambda: network(images))

    def simulate(network: qsd.SpikingNetwork) -> Callable[[], Any]:
        return lambda: network.simulate(images)

    def count_with_merged_kernels(network: qsd.SpikingNetwork) -> Callable[[], Any]:
        def run() -> None:
            for chain in network.chains().values():
                chain.merged_counts = True
            network(images)
            for chain in network.chains().values():
                chain.merged_counts = False

        return run

    limit = options.time_steps + 0.5
    merged = "count domain, merged kernels"
    return [
        Case("float twin", lambda: trained_like(options.model("_ann"), images), evaluate),
        Case("quantized", trained, evaluate, {"float twin": None}),
        Case("count domain", lambda: spiking(False), evaluate, {"quantized": 1.0}),
        Case(merged, lambda: spiking(True), count_with_merged_kernels, {"count domain": None}),
        Case("stepping", lambda: spiking(False), simulate, {"count domain": limit}),
        Case("stepping, merged kernels", lambda: spiking(True), simulate, {merged: limit}),
        Case("conversion", trained, lambda network: lambda: qsd.to_spike_driven(network)),
    ]


def export_cases(options: argparse.Namespace) -> list[Case]:
    """Images one by one through exported files, beside the float twin in torch and in ONNX Runtime."""
    images = options.images().contiguous()  # ranges are measured on all of them

    @cache
    def twin() -> nn.Module:
        return trained_like(options.model("_ann"), images)

    @cache
    def twin_file() -> OnnxFile:
        return OnnxFile.of_float(twin(), images)

    @cache
    def spiking() -> qsd.SpikingNetwork:
        return convert(trained_like(options.model(), images), None, False, None, None, check=False)

    def evaluate(network: Callable[[Tensor], Any]) -> Callable[[], Any]:
        return torch.no_grad()(lambda: [network(image) for image in images.split(1)])

    float_file, plain = "float twin, ONNX Runtime", "float twin, plain 8 bits, ONNX Runtime"
    both: dict[str, float | None] = {"float twin": None, float_file: None}
    return [
        Case("float twin", twin, evaluate),
        Case(float_file, twin_file, evaluate, {"float twin": None}),
        Case(plain, lambda: twin_file().quantized(images), evaluate, both),
        Case("count domain", spiking, evaluate, {"float twin": None}),
        Case("float file", lambda: OnnxFile.of_spiking(spiking(), images, False), evaluate, both),
        Case(
            "integer file",
            lambda: OnnxFile.of_spiking(spiking(), images, True),
            evaluate,
            {"float twin": 1 / 3.5, float_file: 1 / 2},
        ),
    ]


def training_cases(options: argparse.Namespace) -> list[Case]:
    """A training step, eager and compiled: float twin, ours (also of plain layers), with a teacher, direct training."""
    images = options.images()
    labels = torch.randint(options.num_classes, (len(images),), device=images.device)
    eager, compiled = (1.25, 1.1) if options.name.startswith("csdformer") else (1.2, 1.1)

    def step(network: nn.Module) -> Callable[[], Any]:
        return training_step(network, images, labels)

    def plain() -> nn.Module:
        model = options.model()
        qsd.set_lean(model, False)
        return model

    cases = []
    for how, limit in (("eager", eager), *([("compiled", compiled)] if options.compile else [])):
        for kind, suffix in (("float twin", "_ann"), ("quantized", "")):

            def network(suffix: str = suffix, how: str = how) -> nn.Module:
                model = options.model(suffix)
                if how == "compiled":
                    model.compile()
                return model

            versus: dict[str, float | None] = {} if suffix else {f"float twin, {how}": limit}
            if not suffix and how == "eager":
                versus["direct, eager"] = 0.4 if options.name.startswith("csdformer") else None
            cases.append(Case(f"{kind}, {how}", network, step, versus))
    cases.append(Case("plain, eager", plain, step, {"float twin, eager": None}))
    taught = partial(distillation_step, teacher=lambda: options.model("_ann"), images=images, labels=labels)
    cases.append(Case("distilled, eager", options.model, taught, {"quantized, eager": 1.45}))
    direct = partial(DirectlyTrained, options.name, options.time_steps, num_classes=options.num_classes)
    cases.append(Case("direct, eager", lambda: direct().to(options.device), step, {"float twin, eager": None}))
    return cases


def cases_of(suite: str, options: argparse.Namespace) -> list[Case]:
    """The cases of a suite that has any."""
    return {"inference": inference_cases, "training": training_cases, "export": export_cases}[suite](options)


def training_step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Any]:
    """A step of AdamW on one batch."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def distillation_step(
    network: nn.Module, teacher: Callable[[], nn.Module], images: Tensor, labels: Tensor
) -> Callable[[], Any]:
    """The same with a teacher of attention and logits."""
    network.train()
    frozen, recorder = Teacher(teacher(), "float twin"), AttentionRecorder(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        recorder.start()
        logits = network(images)
        taught, maps = frozen(images)
        terms = attention_loss(recorder.take(), maps).values()
        loss = F.cross_entropy(logits, labels) + 0.01 * sum(terms) + logits_loss(logits, taught)
        loss.backward()
        optimizer.step()

    return step


def kept_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes of all storages that a forward pass keeps for the backward pass, parameters and the images left out."""
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), images)}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor.detach())  # held, or its address would be used again
        return tensor

    network.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(images)
    del output
    return sum(size for size, _ in kept.values())


def add_kept_ratios(results: dict[str, Any], of_twin: float) -> None:
    """Divide the bytes that ours keeps by those of its float twin and of plain layers, beside the targets."""
    ours = results["quantized, eager"]
    ours["kept_ratios"] = {
        versus: {"ratio": ours["kept_bytes"] / results[versus]["kept_bytes"], "target": target}
        for versus, target in (("float twin, eager", of_twin), ("plain, eager", 0.55))
    }


def size_cases(options: argparse.Namespace, name: str, images: Tensor, labels: Tensor) -> list[Case]:
    """A count-domain pass and training steps of one model on one size of images."""

    def spiking() -> nn.Module:
        return convert(trained_like(options.model(name=name), images), None, False, None, None, check=False)

    def step(network: nn.Module) -> Callable[[], Any]:
        return training_step(network, images, labels)

    return [
        Case("count domain", spiking, lambda network: lambda: network(images)),
        Case("training step, quantized", lambda: options.model(name=name), step),
        Case("training step, float twin", lambda: options.model("_ann", name), step),
    ]


# -- measuring --------------------------------------------------------------------------------------------------------


class Meter:
    """Runs cases in turns, with a progress bar.

    Args:
        rounds: how often each case is timed.
        device: that they run on.
    """

    def __init__(self, rounds: int, device: torch.device) -> None:
        self.rounds, self.device = rounds, device

    def __call__(self, cases: list[Case], title: str) -> dict[str, Any]:
        """Fill in the seconds of the cases.

        Args:
            cases: to run.
            title: of the progress bar.

        Returns:
            The networks by the cases' names.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(title, total=len(cases) * (self.rounds + 2))
            networks, runs = {}, {}
            for case in cases:
                networks[case.name] = case.network()
                runs[case.name] = case.job(networks[case.name])
                progress.advance(task)
            gc.collect()
            gc.freeze()  # what is there now is not looked at again by the collection before each turn
            for turn in range(-1, self.rounds):  # the first one warms up
                for index in range(len(cases)):
                    case = cases[(index + turn) % len(cases)]
                    seconds = self._time(runs[case.name])
                    if turn >= 0:
                        case.seconds.append(seconds)
                    progress.advance(task)
            gc.unfreeze()
        return networks

    def _time(self, run: Callable[[], Any]) -> float:
        gc.collect()
        self._synchronize()
        time.sleep(PAUSE)
        start = time.perf_counter()
        run()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_memory(options: argparse.Namespace, suite: str, case: str) -> dict[str, float]:
    """Peak resident memory of a process that does nothing but one case, and before it, in bytes."""
    command = [sys.executable, str(Path(__file__).resolve()), suite, "--peak", case, *options.passed_on]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise QsdError(f"measuring the memory of {case!r} failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def report_peak(options: argparse.Namespace, cases: list[Case]) -> None:
    """In the process of its own: run one case twice, print its peaks."""
    case = next(c for c in cases if c.name == options.peak)
    run = case.job(case.network())
    peaks = {"before": resident_peak()}
    if options.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        run()
    peaks["peak"] = resident_peak()
    if options.device.type == "cuda":
        peaks["allocator"] = torch.cuda.max_memory_allocated()
    print(json.dumps(peaks))


def resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would tell the parent's peak, where that was higher
        return 1024 * int(next(line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def summary(case: Case, cases: list[Case]) -> dict[str, Any]:
    """What the rounds of a case say."""
    result = {**spread(case.seconds), "rounds": case.seconds}
    for name, target in case.versus.items():
        other = next(c for c in cases if c.name == name)
        ratios = [a / b for a, b in zip(case.seconds, other.seconds)]
        result.setdefault("ratios", {})[name] = {"target": target, **spread(ratios), "rounds": ratios}
    return result


def spread(values: list[float]) -> dict[str, float]:
    first, middle, third = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "lower_quartile": first, "upper_quartile": third}


def sizes(options: argparse.Namespace, measure: Meter) -> dict[str, Any]:
    """Seconds per image over image sizes and over models, and the exponents of their growth."""
    results: dict[str, Any] = {}
    tables = {
        "pixels": [(options.name, size, size**2) for size in options.sizes],
        "parameters": [(name, options.img_size, None) for name in options.models],
    }
    for axis, rows in tables.items():
        table: dict[str, list[Any]] = {"x": [], "label": []}
        for name, size, x in rows:
            images = options.images(size, 2)
            labels = torch.randint(options.num_classes, (len(images),), device=images.device)
            cases = size_cases(options, name, images, labels)
            measure(cases, f"{name}, {size} px")
            table["x"].append(x or sum(p.numel() for p in options.model(name=name).parameters()))
            table["label"].append(f"{size} px" if axis == "pixels" else name)
            for case in cases:
                table.setdefault(case.name, []).append(median(case.seconds) / len(images))
        table["exponents"] = {
            key: float(np.polyfit(np.log(table["x"]), np.log(values), 1)[0])
            for key, values in table.items()
            if key not in ("x", "label")
        }
        results[axis] = table
    return results


# -- the command ------------------------------------------------------------------------------------------------------


def measure_suite(suite: str, options: argparse.Namespace) -> dict[str, Any]:
    """The results of one suite, by case."""
    cases = cases_of(suite, options)
    networks = Meter(options.rounds, options.device)(cases, suite)
    results = {case.name: summary(case, cases) for case in cases}
    if suite == "training":
        images = options.images()
        for name, network in networks.items():
            if name.endswith("eager") and not name.startswith(
                "distilled"
            ):  # more than its forward pass keeps something
                results[name]["kept_bytes"] = kept_bytes(network, images)
        add_kept_ratios(results, 0.75 if options.name.startswith("csdformer") else 0.8)
    if suite == "export":
        for name, network in networks.items():
            if isinstance(network, OnnxFile):
                results[name]["file_bytes"] = len(network.content)
    networks.clear()
    if options.memory:
        for name, result in results.items():
            result["peak_memory"] = peak_memory(options, suite, name)
    return results


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="what to measure; all if left out")
    parser.add_argument("--model", default="qsd_15m", help="registered name")
    parser.add_argument("--time-steps", type=int, default=4, help="T")
    parser.add_argument("--img-size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=8, help="images per pass or step")
    parser.add_argument("--num-classes", type=int, default=1000, help="outputs of the classifier")
    parser.add_argument("--rounds", type=int, default=7, help="how often each case is timed")
    parser.add_argument("--threads", type=int, help="threads of the processor; torch's own choice if left out")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, help="processes that load images; the data module's choice if left out")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="image sides of the table of growth")
    parser.add_argument("--models", nargs="+", default=MODELS, help="models of the table of growth")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled cases")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument(
        "--quick", action="store_true", help="a small model, small images, three rounds, nothing compiled"
    )
    parser.add_argument("--output", type=Path, default=Path(), help="folder for benchmark.json and benchmark.png")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if args is None else args)
    if "--quick" in given:
        parser.set_defaults(model="qsd_tiny", img_size=64, batch_size=4, rounds=3, num_classes=10)
        parser.set_defaults(sizes=(48, 64), models=("qsd_tiny", "qsd_8m"), no_compile=True)
    options = parser.parse_args(given)
    options.passed_on = [word for word in given if word not in SUITES]
    options.name, options.memory = options.model, not options.no_memory
    options.compile = not options.no_compile
    options.device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    unknown = [name for name in (options.name, *options.models) if not timm.is_model(f"{name}_ann")]
    if unknown:
        raise QsdError(f"model {unknown[0]!r} is unknown or has no float twin; try qsd_15m.")
    for name in ("rounds", "batch_size", "img_size", "time_steps"):
        if getattr(options, name) < 1:
            raise QsdError(f"{name}={getattr(options, name)} is not positive.")
    if not options.output.is_dir():
        raise QsdError(f"the folder {options.output} does not exist; make it first.")

    def model(suffix: str = "", name: str = options.name) -> nn.Module:
        steps = {} if suffix else {"time_steps": options.time_steps}
        return timm.create_model(f"{name}{suffix}", num_classes=options.num_classes, **steps).to(options.device)

    def images(size: int = options.img_size, batch: int = options.batch_size) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(batch, 3, size, size, generator=generator)
        return noise.to(options.device).contiguous(memory_format=torch.channels_last)

    options.model, options.images = model, images
    return options


def run(options: argparse.Namespace) -> None:
    suites = options.suites or SUITES
    if options.peak:
        report_peak(options, cases_of(suites[0], options))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)  # a table in a file needs its columns
    results: dict[str, Any] = {
        "model": options.name,
        "time_steps": options.time_steps,
        "img_size": options.img_size,
        "batch_size": options.batch_size,
        "device": str(options.device),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for suite in suites:
        if suite == "sizes":
            results[suite] = sizes(options, Meter(options.rounds, options.device))
            show_sizes(console, results[suite])
        elif suite == "loading":
            results[suite] = loading(options.model(), options)
            show_loading(console, results[suite])
        else:
            results[suite] = measure_suite(suite, options)
            how = f"{options.batch_size} images one by one" if suite == "export" else f"batch {options.batch_size}"
            show(console, f"{suite}, {options.name}, {options.img_size} px, {how}", results[suite])
        partial_file = options.output / "benchmark.json.part"  # after every suite: a long run is not lost
        partial_file.write_text(json.dumps(results, indent=1))
        partial_file.replace(options.output / "benchmark.json")
    draw(results, options.output / "benchmark.png")
    console.print(f"written: {options.output / 'benchmark.json'}, {options.output / 'benchmark.png'}")


def main(args: list[str] | None = None) -> int:
    try:
        run(parse(args))
    except (QsdError, OSError) as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
