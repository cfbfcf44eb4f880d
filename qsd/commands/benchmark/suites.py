"""The suites of a benchmark: each measures its cases and returns the results as plain data."""

from statistics import median
from typing import Any

import numpy as np
import torch

from qsd.commands.benchmark.cases import cases_of, size_cases
from qsd.commands.benchmark.meter import Meter, kept_bytes, peak_memory, summary
from qsd.commands.benchmark.onnx_file import OnnxFile
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
    networks = Meter(settings.rounds, settings.device)(cases, suite)
    results = {case.name: summary(case, cases) for case in cases}
    if suite == "training":
        images = settings.images()
        for name, network in networks.items():
            # With a teacher, more than the forward pass of the student keeps tensors.
            if name.endswith("eager") and not name.startswith("distilled"):
                results[name]["kept_bytes"] = kept_bytes(network, images)
        _add_kept_ratios(results, 0.75 if family_of(settings.name).cls is CsdFormer else 0.8)
    if suite == "export":
        for name, network in networks.items():
            if isinstance(network, OnnxFile):
                results[name]["file_bytes"] = len(network.content)
    networks.clear()
    if settings.memory:
        for name, result in results.items():
            result["peak_memory"] = peak_memory(settings, suite, name)
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


def _add_kept_ratios(results: dict[str, Any], of_twin: float) -> None:
    """Divide the kept bytes of the quantized network by those of its float twin and of plain layers.

    Args:
        results: The results by case, which are completed.
        of_twin: The target of the ratio to the float twin.
    """
    ours = results["quantized, eager"]
    ours["kept_ratios"] = {
        versus: {"ratio": ours["kept_bytes"] / results[versus]["kept_bytes"], "target": target}
        for versus, target in (("float twin, eager", of_twin), ("plain, eager", 0.55))
    }
