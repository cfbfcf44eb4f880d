"""Small detectors, and batches with and without boxes."""

import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

import qsd.mm.detection  # noqa: F401
from tests.helpers import CONFIGS
from tests.helpers.mm import SMALL


def narrow(part):
    """Sixteen features wherever a detector has 256 or 1024, and as few regions for each image."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        if isinstance(value, dict | list):
            narrow(value)
        elif value in (256, 512, 1024):
            part[key] = 16


def build(name):
    config = Config.fromfile(CONFIGS / f"{name}.py")
    config.merge_from_dict(SMALL)
    narrow(config.model)
    init_default_scope(config.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    return model


def batch(kind):
    """Two images of 64x64 pixels: with boxes, without any, with boxes to ignore (crowds), or of one and none."""
    samples = []
    for index in range(2):
        boxes, masks = torch.zeros(0, 4), torch.zeros(0, 64, 64, dtype=torch.uint8)
        if kind == "boxes" or (kind == "one" and index == 0):
            boxes, masks = torch.tensor([[4.0, 6, 44, 50]]), torch.ones(1, 64, 64, dtype=torch.uint8)
        sample = DetDataSample(metainfo={"img_shape": (64, 64), "ori_shape": (64, 64), "scale_factor": (1.0, 1.0)})
        labels = torch.ones(len(boxes), dtype=torch.long)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels, masks=BitmapMasks(masks.numpy(), 64, 64))
        if kind == "crowds":
            sample.ignored_instances = InstanceData(bboxes=torch.tensor([[4.0, 6, 44, 50]]))
        samples.append(sample)
    generator = torch.Generator().manual_seed(1)
    pictures = [torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8, generator=generator) for _ in range(2)]
    return {"inputs": pictures, "data_samples": samples}
