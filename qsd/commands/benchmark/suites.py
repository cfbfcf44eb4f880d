"""The suites of a benchmark: each measures its cases and returns the results as plain data."""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch

from qsd.commands.benchmark.cases import cases_of, size_cases
from qsd.commands.benchmark.largest import largest_steps
from qsd.commands.benchmark.meter import Meter, kept_bytes, peak_memory, summary
from qsd.commands.benchmark.onnx_file import OnnxFile
from qsd.commands.benchmark.precisions import suffix
from qsd.commands.benchmark.settings import Settings
from qsd.models import CsdFormer
from qsd.models.variants import family_of


def compare(suite: str, settings: Settings) -> dict[str, Any]:
    """Measure the cases of a suite side by side.

    Args:
        suite: ``"inference"``, ``"training"`` or ``"export"``.
        settings: The settings of the benchmark.

    Returns:
        The results by case.
    """
    cases = cases_of(suite, settings)
    with _many_programs(settings):
        networks = Meter(settings.rounds, settings.device, settings.profile)(cases, suite)
    results = {case.name: summary(case, cases) for case in cases}
    for name, result in results.items():
        if name != "conversion":
            result["images_per_second"] = settings.batch_size / result["median"]
    if suite == "training":
        _add_kept_bytes(results, networks, settings)
    if suite == "export":
        for name, network in networks.items():
            if isinstance(network, OnnxFile):
                results[name]["file_bytes"] = len(network.content)
    networks.clear()
    if settings.memory and settings.device.type != "cuda":  # the meter has asked the allocator of a device
        for name, result in results.items():
            result["peak_memory"] = peak_memory(settings, suite, name)
    if settings.largest and suite == "training":
        for name, result in results.items():
            with _many_programs(settings):
                result["largest"] = largest_steps(settings, name)
    return results


def growth(settings: Settings) -> dict[str, Any]:
    """Seconds per image over image sizes and over models, and the exponents of their growth.

    Args:
        settings: The settings of the benchmark.
    """
    results: dict[str, Any] = {}
    tables: dict[str, list[tuple[str, int, int | None]]] = {
        "pixels": [(settings.name, size, size**2) for size in settings.sizes],
        "parameters": [(name, settings.img_size, None) for name in settings.models],
    }
    measure = Meter(settings.rounds, settings.device)
    for axis, rows in tables.items():
        table: dict[str, Any] = {"x": [], "label": []}
        for name, size, x in rows:
            images = settings.images(size, 2)
            labels = torch.randint(settings.num_classes, (len(images),), device=images.device)
            cases = size_cases(settings, name, images, labels)
            measure(cases, f"{name}, {size} px")
            table["x"].append(x or sum(p.numel() for p in settings.model(name=name).parameters()))
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


@contextmanager
def _many_programs(settings: Settings) -> Iterator[None]:
    """Let every compiled case have its programs: beyond a limit, PyTorch runs further ones without compiling them."""
    if not settings.compile:
        yield
        return
    import torch._dynamo.config as config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before PyTorch 2.7
    with config.patch({name: 256}):
        yield


def _add_kept_bytes(results: dict[str, Any], networks: dict[str, Any], settings: Settings) -> None:
    """Count the bytes that eager steps keep, and divide those of the quantized network by the others'.

    Args:
        results: The results by case, which are completed.
        networks: The networks by case.
        settings: The settings of the benchmark.
    """
    images, cuda = settings.images(), settings.device.type == "cuda"
    of_twin = 0.6 if cuda else 0.75 if family_of(settings.name).cls is CsdFormer else 0.8
    for precision in settings.precisions:
        end = suffix(precision)
        for name in ("float twin", "quantized", "plain", "lean", "direct"):
            if (case := f"{name}, eager{end}") in networks:
                results[case]["kept_bytes"] = kept_bytes(networks[case], images, precision)
        ours = results[f"quantized, eager{end}"]
        versus = {f"float twin, eager{end}": of_twin} | ({} if cuda else {f"plain, eager{end}": 0.55})
        ours["kept_ratios"] = {
            name: {"ratio": ours["kept_bytes"] / results[name]["kept_bytes"], "target": target}
            for name, target in versus.items()
        }
