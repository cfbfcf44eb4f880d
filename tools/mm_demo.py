"""Train a detector or a segmenter on scenes of digits, test it, draw what it sees, and say in a table what came out.

python tools/mm_demo.py detection
python tools/mm_demo.py segmentation
"""

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qsd import QsdError
from qsd.cli import main as qsd

try:
    from qsd.mm import command
    from qsd.mm.drawing import draw_predictions
except QsdError as error:
    print(f"mm_demo: error: {error}", file=sys.stderr)
    sys.exit(2)

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SCENES = Path("data/digit_scenes")
DEMOS = {
    "detection": ("mmdet", "digits_det", {"box AP50": "coco/bbox_mAP_50", "mask AP50": "coco/segm_mAP_50"}),
    "segmentation": ("mmseg", "digits_seg", {"mIoU": "mIoU"}),
}


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=DEMOS)
    parser.add_argument("--pretraining", nargs="*", default=[], metavar="OPTION", help="further options for qsd fit")
    parser.add_argument("--cfg-options", nargs="*", default=[], metavar="KEY=VALUE", help="for training and test")
    options = parser.parse_args(args)
    framework, name, metrics = DEMOS[options.kind]
    config = str(CONFIGS / f"{name}.py")
    changes = ["--cfg-options", *options.cfg_options] if options.cfg_options else []
    if not SCENES.is_dir():
        print(f"mm_demo: error: {SCENES} does not exist; run tools/make_digit_scenes.py {SCENES}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    if _newest("runs/digit_crops/version_*/checkpoints/best.ckpt") is None:
        crops = ["fit", "--config", str(CONFIGS / "digit_crops.yaml"), *options.pretraining]
        if code := qsd(crops):
            return code
    pretrained = _newest("runs/digit_crops/version_*/checkpoints/best.ckpt")
    if code := command.train("mm_demo", framework, [config, "--pretrained", str(pretrained), *changes]):
        return code
    seconds = time.perf_counter() - start
    best = _newest(f"runs/{name}/best_*.pth")
    if code := command.test("mm_demo", framework, [config, str(best), "--work-dir", f"runs/{name}/test", *changes]):
        return code
    results = json.loads(_newest(f"runs/{name}/test/2*/2*.json").read_text())
    pictures = Path("runs", name, "pictures")
    draw_predictions(sorted((SCENES / "images/test").glob("*.jpg"))[:16], best, pictures)
    table = Table("what", "value", title=f"Digits in photographs: {options.kind}, 4-bit weights, T = 4 time steps")
    for title, key in metrics.items():
        table.add_row(f"{title} on test scenes", f"{results[key] / (100 if framework == 'mmseg' else 1):.3f}")
    table.add_row("mean firing rate", f"{results['spikes/mean']:.3f}")
    table.add_row("training time, pretraining included", f"{seconds:.0f} s")
    table.add_row("checkpoint, the best on validation scenes", str(best))
    table.add_row("pictures", str(pictures))
    Console().print(table)
    return 0


def _newest(pattern: str) -> Path | None:
    return max(Path().glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


if __name__ == "__main__":
    sys.exit(main())
