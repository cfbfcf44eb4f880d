"""The largest batch of a training step that fits into the memory of a device."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from qsd.commands.benchmark.cases import cases_of
from qsd.commands.benchmark.settings import Settings

_MOST = 2**16


def largest_batch(fits: Callable[[int], bool], start: int) -> int:
    """The largest batch that fits: by doubling, then by bisection, to a sixteenth.

    Args:
        fits: Tells of a number of images whether it fits.
        start: The number to begin with.

    Returns:
        A number that fits; 0 if not even one image does.
    """
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
        if high > _MOST:
            return low
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_steps(settings: Settings, name: str) -> dict[str, Any]:
    """The largest batch of one case of the training suite, alone on the device, and the time of its step.

    Args:
        settings: The settings of the benchmark.
        name: The name of the case.

    Returns:
        The batch, the median of the seconds, images per second, and the peak of the allocator in bytes.
    """
    measured: dict[int, tuple[float, int]] = {}

    def fits(batch: int) -> bool:
        try:
            measured[batch] = _time(replace(settings, batch_size=batch), name)
        except torch.OutOfMemoryError:
            return False
        finally:  # after the error is handled, whose traceback holds tensors
            _release(settings.device)
        return True

    batch = largest_batch(fits, settings.batch_size)
    if not batch:
        return {"batch_size": 0}
    seconds, peak = measured[batch]
    return {"batch_size": batch, "median": seconds, "images_per_second": batch / seconds, "allocator_peak": peak}


def _time(settings: Settings, name: str) -> tuple[float, int]:
    """Median seconds of a step and the allocator's peak in bytes, with everything that the case holds."""
    case = next(case for case in cases_of("training", settings) if case.name == name)
    run, seconds = case.job(case.network()), []
    torch.cuda.reset_peak_memory_stats(settings.device)
    for turn in range(settings.rounds + 2):  # the first two warm up
        torch.cuda.synchronize(settings.device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(settings.device)
        if turn > 1:
            seconds.append(time.perf_counter() - start)
    return median(seconds), torch.cuda.max_memory_allocated(settings.device)


def _release(device: torch.device) -> None:
    """Give back what a try left behind."""
    torch.compiler.reset()  # a compiled step belongs to one size
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
