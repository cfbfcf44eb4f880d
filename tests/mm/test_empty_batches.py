"""Batches in which no image has a box left: the loss is that of background, and every parameter has a gradient."""

import pytest
import torch
from torch import nn

from qsd.mm.layers import SpikeDeconv2d
from tests.helpers import sample
from tests.helpers.detection import batch, build
from tests.helpers.processes import run_in_two

NAMES = ["coco_qsd", "coco_cascade_qsd", "coco_retinanet_qsd"]


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


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="gloo is not built in")
@pytest.mark.parametrize("name", sample([], NAMES))
def test_one_of_two_processes_may_have_no_box(name):
    output = run_in_two("empty_batch.py", name, CUDA_VISIBLE_DEVICES="")
    reached = len(step(build(name), "boxes")[1])
    assert f"parameters {reached} different 0" in output
