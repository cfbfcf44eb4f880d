"""Pictures of the predictions of a trained detector or segmenter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from matplotlib import colormaps
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import TRANSFORMS, VISUALIZERS
from rich.progress import track

from qsd.errors import QsdError
from qsd.mm.loading import load_model
from qsd.reading.files import regular_file
from qsd.reading.images import BadImage, load_image


@torch.no_grad()
def draw_predictions(
    images: Sequence[str | Path], checkpoint: str | Path, out: str | Path, score: float = 0.3, device: str = "cpu"
) -> list[Path]:
    """Write a picture ``<name>.png`` with boxes, masks or segments for each image.

    Args:
        images: The image files.
        checkpoint: The checkpoint of a training, as `qsd.mm.loading.load_model` reads it.
        out: The folder of the pictures, which is made if needed.
        score: The lowest score of a box that is drawn.
        device: The device to compute on.

    Returns:
        The paths of the pictures, in the order of the images.

    Raises:
        QsdError: If the checkpoint or an image cannot be read, or two images have the same name.
    """
    model, config = load_model(checkpoint, device)
    targets = [Path(out) / f"{Path(image).stem}.png" for image in images]
    if len(set(targets)) < len(targets):
        raise QsdError("two images have the same name, and would have the same picture; draw them into two folders.")
    visualizer = _visualizer(model, config, f"predictions of {checkpoint}")
    limit = {"pred_score_thr": score} if config.default_scope == "mmdet" else {"with_labels": False}
    for image, target in track(list(zip(images, targets)), "pictures"):
        pixels, data = read_image(config, image)
        (sample,) = model.test_step(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        visualizer.add_datasample(
            target.stem, mmcv.bgr2rgb(pixels), sample, draw_gt=False, out_file=str(target), **limit
        )
    return targets


def read_image(config: Config, image: str | Path) -> tuple[Any, dict[str, Any]]:
    """An image as the test pipeline of a configuration reads it.

    Args:
        config: The configuration of a training.
        image: The image file.

    Returns:
        Its pixels ``[H, W, 3]`` in OpenCV's order, and a batch of one.

    Raises:
        QsdError: If it cannot be read.
    """
    steps = [step for step in config.test_dataloader.dataset.pipeline if step["type"] != "LoadAnnotations"]
    orientation = next((step["color_type"] for step in steps if "color_type" in step), "color")
    # The same rule of EXIF orientation as the pipeline's; OpenMMLab's own is upright.
    regular_file(image, "image")
    checked = load_image(str(image))
    pixels = None if isinstance(checked, BadImage) else mmcv.imread(str(image), orientation)
    if pixels is None:
        reason = checked.reason if isinstance(checked, BadImage) else "OpenCV does not know its format"
        raise QsdError(f"image {image} cannot be read: {reason}.")
    pipeline = Compose([TRANSFORMS.build(step) for step in steps])
    return pixels, pseudo_collate([pipeline({"img_path": str(image), "img_id": 0})])


def _visualizer(model: Any, config: Config, name: str) -> Any:
    """The visualizer of a configuration, which draws each class in a colour of its own."""
    classes = len(model.dataset_meta["classes"])
    if not model.dataset_meta.get("palette"):
        colours = colormaps["tab20"](np.linspace(0, 1, classes))[:, :3]
        model.dataset_meta["palette"] = [tuple(int(255 * part) for part in colour) for colour in colours]
    visualizer = VISUALIZERS.build({**config.visualizer, "name": name, "vis_backends": []})
    visualizer.dataset_meta = model.dataset_meta
    return visualizer
