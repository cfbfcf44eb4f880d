"""Pictures of what a trained detector or segmenter predicts."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from matplotlib import colormaps
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, TRANSFORMS, VISUALIZERS, init_default_scope
from rich.progress import track
from torch import Tensor

from qsd.errors import QsdError
from qsd.mm.command import move_data
from qsd.models.checkpoints import read_checkpoint


class _Unread:
    """In place of what mmengine pickles beside the weights and nobody needs here: losses, and methods by `getattr`."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_IN_CHECKPOINTS: list[Any] = [
    np.ndarray,
    np.zeros(0).__reduce__()[0],
    (_Unread, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_Unread, "builtins.getattr"),
]


def load_model(
    checkpoint: str | Path, device: str = "cpu", options: Mapping[str, Any] | None = None
) -> tuple[Any, Config]:
    """A trained model in evaluation, and the configuration it was trained with, from a checkpoint of a training.

    Args:
        checkpoint: ``.pth`` file that mmengine wrote.
        device: where the model shall lie.
        options: settings of the configuration to override; a changed ``data_root`` is changed wherever it is used.

    Raises:
        QsdError: if there is no such file, or it is something else; if there is no such folder of data.
    """
    with torch.serialization.safe_globals(_IN_CHECKPOINTS):
        content = read_checkpoint(checkpoint)
    meta = content.get("meta") or {}
    if "cfg" not in meta or "state_dict" not in content:
        raise QsdError(f"{checkpoint} is no checkpoint of a training with mmdet or mmseg.")
    config = Config.fromstring(meta["cfg"], ".py")
    root = config.get("data_root")
    config.merge_from_dict(dict(options or {}))
    if root is not None and config.data_root != root:
        move_data(config, root, config.data_root)
    return build_model(config, content["state_dict"], meta["dataset_meta"]).to(device), config


def build_model(config: Config, weights: Mapping[str, Tensor], dataset_meta: Mapping[str, Any]) -> Any:
    """A model in evaluation with given weights.

    Args:
        config: of its training.
        weights: its state dict.
        dataset_meta: names of classes.
    """
    init_default_scope(config.default_scope)
    options = copy.deepcopy(config.model)
    options.backbone.pop("init_cfg", None)
    model = MODELS.build(options)
    model.load_state_dict(weights)
    model.dataset_meta = dataset_meta
    return model.eval()


@torch.no_grad()
def draw_predictions(
    images: Sequence[str | Path], checkpoint: str | Path, out: str | Path, score: float = 0.3, device: str = "cpu"
) -> list[Path]:
    """Write a picture ``<name>.png`` with boxes, masks or segments for each image.

    Args:
        images: image files.
        checkpoint: see `load_model`.
        out: folder, made if needed.
        score: least score of a box that is drawn.
        device: where to compute.

    Returns:
        The pictures, in the order of the images.

    Raises:
        QsdError: for a checkpoint or image that cannot be read, or two images of one name.
    """
    model, config = load_model(checkpoint, device)
    targets = [Path(out) / f"{Path(image).stem}.png" for image in images]
    if len(set(targets)) < len(targets):
        raise QsdError("two images have the same name, and would have the same picture; draw them into two folders.")
    steps = [step for step in config.test_dataloader.dataset.pipeline if step["type"] != "LoadAnnotations"]
    pipeline = Compose([TRANSFORMS.build(step) for step in steps])
    classes = len(model.dataset_meta["classes"])
    if not model.dataset_meta.get("palette"):
        colours = colormaps["tab20"](np.linspace(0, 1, classes))[:, :3]
        model.dataset_meta["palette"] = [tuple(int(255 * part) for part in colour) for colour in colours]
    visualizer = VISUALIZERS.build({**config.visualizer, "name": f"mm_predict {checkpoint}", "vis_backends": []})
    visualizer.dataset_meta = model.dataset_meta
    limit = {"pred_score_thr": score} if config.default_scope == "mmdet" else {"with_labels": False}
    for image, target in track(list(zip(images, targets)), "pictures"):
        if not Path(image).is_file() or (pixels := mmcv.imread(str(image))) is None:
            raise QsdError(f"image {image} does not exist or cannot be read.")
        data = pseudo_collate([pipeline({"img_path": str(image), "img_id": 0})])
        (sample,) = model.test_step(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        visualizer.add_datasample(
            target.stem, mmcv.bgr2rgb(pixels), sample, draw_gt=False, out_file=str(target), **limit
        )
    return targets
