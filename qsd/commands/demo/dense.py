"""The demonstrations of a detector and a segmenter on scenes of digits: training, test and pictures.

This module needs OpenMMLab.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import qsd_launcher
from qsd.mm import command
from qsd.mm.drawing import draw_predictions

_DEMOS = {
    "detection": ("mmdet", "digits_det", {"box AP50": "coco/bbox_mAP_50", "mask AP50": "coco/segm_mAP_50"}),
    "segmentation": ("mmseg", "digits_seg", {"mIoU": "mIoU"}),
}
_CROPS = "runs/digit_crops/version_*/checkpoints/best.ckpt"


def run(kind: str, scenes: Path, pretraining: Sequence[str], changes: Sequence[str]) -> int:
    """Pretrain the backbone on crops, train on scenes, test, draw predictions, and print a table of the results.

    Args:
        kind: ``"detection"`` or ``"segmentation"``.
        scenes: The folder of the scenes.
        pretraining: Further options of ``qsd fit`` for the pretraining.
        changes: Settings of the configuration to override, as ``KEY=VALUE``.

    Returns:
        The exit code.

    Raises:
        QsdError: If a setting is wrong.
    """
    framework, name, _ = _DEMOS[kind]
    config = f"configs/{name}.py"
    overrides = ["--cfg-options", *changes] if changes else []
    start = time.perf_counter()
    pretrained = _newest(_CROPS)
    if pretrained is None:
        if code := qsd_launcher.main(["fit", "--config", "configs/digit_crops.yaml", *pretraining]):
            return code
        pretrained = _newest(_CROPS)
    command.train("qsd demo", framework, [config, "--pretrained", str(pretrained), *overrides])
    seconds = time.perf_counter() - start
    best = _newest(f"runs/{name}*/best_*.pth")
    assert best is not None
    command.test("qsd demo", framework, [config, str(best), "--work-dir", str(best.parent / "test"), *overrides])
    written = _newest(f"{best.parent}/test/2*/2*.json")
    assert written is not None
    results = json.loads(written.read_text())
    pictures = best.parent / "pictures"
    draw_predictions(sorted((scenes / "images/test").glob("*.jpg"))[:16], best, pictures)
    paths = {"checkpoint, the best on validation scenes": best, "pictures": pictures}
    Console().print(_table(kind, results, seconds, paths))
    return 0


def _table(kind: str, results: Mapping[str, float], seconds: float, paths: Mapping[str, Path]) -> Table:
    framework, _, metrics = _DEMOS[kind]
    percent = 100 if framework == "mmseg" else 1  # mmseg gives percentages
    table = Table("result", "value", title=f"Digits on photographs: {kind}, 4-bit weights, T = 4 time steps")
    for title, key in metrics.items():
        table.add_row(f"{title} on test scenes", f"{results[key] / percent:.3f}")
    rate = next(results[key] for key in ("spikes/rate", "spikes/mean") if key in results)
    table.add_row("mean firing rate", f"{rate:.3f}")
    table.add_row("training time, with pretraining", f"{seconds:.0f} s")
    for title, path in paths.items():
        table.add_row(title, escape(str(path)))
    return table


def _newest(pattern: str) -> Path | None:
    return max(Path().glob(pattern), key=lambda path: path.stat().st_mtime, default=None)
