"""Batches in which no image has a box left: the loss is that of background, and every parameter has a gradient."""

import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from torch import nn

import qsd.mm.detection  # noqa: F401
from qsd.mm.layers import SpikeDeconv2d
from tests.helpers import CONFIGS
from tests.helpers.mm import SMALL

NAMES = ["coco_qsd", "coco_cascade_qsd", "coco_retinanet_qsd"]


def narrow(part):
    if isinstance(part, dict):
        if "fc_out_channels" in part:
            part["fc_out_channels"] = 16
        part = list(part.values())
    for value in part if isinstance(part, list) else ():
        narrow(value)


def build(name, spiking=True):
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
        sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0)))
        labels = torch.ones(len(boxes), dtype=torch.long)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels, masks=BitmapMasks(masks.numpy(), 64, 64))
        if kind == "crowds":
            sample.ignored_instances = InstanceData(bboxes=torch.tensor([[4.0, 6, 44, 50]]))
        samples.append(sample)
    generator = torch.Generator().manual_seed(1)
    pictures = [torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8, generator=generator) for _ in range(2)]
    return {"inputs": pictures, "data_samples": samples}


def step(model, kind):
    model.zero_grad()
    losses = model(**model.data_preprocessor(batch(kind), training=True), mode="loss")
    total, log = model.parse_losses(losses)
    total.backward()
    return log, {name for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["nothing", "crowds"])
def test_a_batch_without_boxes_trains_on_background(name, kind):
    model = build(name)
    _, usual = step(model, "boxes")
    log, reached = step(model, kind)
    assert reached >= usual
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    for key, loss in log.items():
        if "bbox" in key or "mask" in key:
            assert float(loss) == 0, key
        elif "cls" in key:
            assert float(loss) > 0, key
    if "retinanet" not in name:
        assert any(key.endswith("loss_mask") for key in log)


@pytest.mark.parametrize("height", [1, 7, 14])
def test_the_enlargement_of_nothing_has_a_shape_and_a_gradient(height):
    layer = SpikeDeconv2d(4, 3)
    regions = torch.zeros(0, 4, height, 5, requires_grad=True)
    enlarged = layer(regions)
    assert enlarged.shape == (0, 3, 2 * height, 10)
    enlarged.sum().backward()
    assert regions.grad.shape == regions.shape
    assert all(bool((p.grad == 0).all()) for p in layer.parameters())


def test_the_enlargement_of_something_is_pytorch_s():
    layer = SpikeDeconv2d(4, 3)
    regions = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(layer(regions), nn.PixelShuffle(2)(layer.conv(regions)), rtol=0, atol=0)
