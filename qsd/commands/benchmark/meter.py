"""Measuring cases: times in turns, bytes kept for the backward pass, peak memory of a process."""

import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from qsd.commands.benchmark.cases import Case
from qsd.commands.benchmark.precisions import arithmetic, autocast
from qsd.commands.benchmark.settings import Settings
from qsd.errors import QsdError

_PAUSE = 0.1  # seconds before each turn: idle threads of the last one keep a core busy for that time


class Meter:
    """Runs cases in turns, with a progress bar.

    Args:
        rounds: Number of times that each case is timed.
        device: The device that the cases compute on.
        profile: The name of a case whose kernels are listed after the times, or ``None``.
    """

    def __init__(self, rounds: int, device: torch.device, profile: str | None = None) -> None:
        self.rounds, self.device, self.profile = rounds, device, profile
        # On a device the second step finds memory and algorithms that the first one has chosen.
        self.warmups = 3 if device.type == "cuda" else 1

    def __call__(self, cases: Sequence[Case], title: str) -> dict[str, Any]:
        """Measure the seconds of the cases.

        Args:
            cases: The cases, whose `seconds` are filled in.
            title: The title of the progress bar.

        Returns:
            The networks by the names of the cases.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(title, total=len(cases) * (self.rounds + self.warmups + 1))
            networks, runs = {}, {}
            for case in cases:
                networks[case.name] = case.network()
                runs[case.name] = case.job(networks[case.name])
                progress.advance(task)
            gc.collect()
            gc.freeze()  # the collection before each turn then skips all objects that exist now
            for turn in range(-self.warmups, self.rounds):
                for index in range(len(cases)):
                    case = cases[(index + turn) % len(cases)]
                    seconds = self._time(runs[case.name])
                    if turn >= 0:
                        case.seconds.append(seconds)
                    progress.advance(task)
            gc.unfreeze()
        for case in cases:
            if self.device.type == "cuda":
                case.allocator_peak = self._allocator_peak(networks[case.name], runs[case.name])
            if case.name == self.profile:
                case.profile = kernels(runs[case.name], self.device)
        return networks

    def _allocator_peak(self, network: Any, run: Callable[[], Any]) -> int:
        """Bytes that the allocator holds at most in a run beyond those before it, weights and their moments."""
        if isinstance(network, nn.Module):
            network.zero_grad(set_to_none=True)  # those of the last step are no part of what a step begins with
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self._synchronize()
        return int(torch.cuda.max_memory_allocated(self.device) - before)

    def _time(self, run: Callable[[], Any]) -> float:
        gc.collect()
        self._synchronize()
        time.sleep(_PAUSE)
        start = time.perf_counter()
        run()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def kernels(run: Callable[[], Any], device: torch.device) -> str:
    """A table of the kernels of a run, those that take most of the time first.

    Args:
        run: The run, which has been run before.
        device: The device that it computes on: the kernels of a CUDA device, or the operators of a processor.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=70)


def kept_bytes(network: nn.Module, images: Tensor, precision: str = "float32") -> int:
    """Bytes of all storages that a forward pass keeps for the backward pass, without parameters and images.

    Args:
        network: The network, which is put in training mode.
        images: Images ``[B, C, H, W]``.
        precision: The number format of the pass.
    """
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), images)}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor.detach())  # held, or its address would be used again
        return tensor

    network.train()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with arithmetic(precision), autocast(precision, images.device), hooks:
        output = network(images)
    del output
    return sum(size for size, _ in kept.values())


def peak_memory(settings: Settings, suite: str, case: str) -> dict[str, float]:
    """Resident memory in bytes of a process that runs one case alone: its peak, and the peak before the case.

    Args:
        settings: The settings of the benchmark.
        suite: The suite of the case.
        case: The name of the case.

    Raises:
        QsdError: If the process fails.
    """
    command = [sys.executable, "-m", "qsd", "benchmark", suite, "--peak", case, *settings.passed_on]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise QsdError(f"measuring the memory of {case!r} failed: {reason}")
    peaks: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def report_peak(settings: Settings, cases: Sequence[Case]) -> None:
    """In the process of its own: run the case ``settings.peak`` twice and print its peaks.

    Args:
        settings: The settings of the benchmark.
        cases: The cases of its suite.
    """
    case = next(c for c in cases if c.name == settings.peak)
    run = case.job(case.network())
    peaks = {"before": resident_peak()}
    for _ in range(2):
        run()
    peaks["peak"] = resident_peak()
    print(json.dumps(peaks))


def resident_peak() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` gives the peak of the parent, where that was higher
        return 1024 * int(next(line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def summary(case: Case, cases: Sequence[Case]) -> dict[str, Any]:
    """Median and quartiles of a case, and of its ratios to others, round by round.

    Args:
        case: The measured case.
        cases: All cases of its suite.
    """
    result: dict[str, Any] = {**_spread(case.seconds), "rounds": case.seconds}
    result |= {key: value for key in ("allocator_peak", "profile") if (value := getattr(case, key)) is not None}
    for name, target in case.versus.items():
        other = next(c for c in cases if c.name == name)
        ratios = [a / b for a, b in zip(case.seconds, other.seconds)]
        result.setdefault("ratios", {})[name] = {"target": target, **_spread(ratios), "rounds": ratios}
    return result


def _spread(values: list[float]) -> dict[str, float]:
    first, middle, third = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "lower_quartile": first, "upper_quartile": third}
