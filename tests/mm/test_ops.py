"""mmcv's operators from torchvision, against numbers of the compiled ones."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from qsd import QsdError
from qsd.mm import ops
from tests.helpers import DATA

mmcv_ops = pytest.importorskip("mmcv.ops")
COMPILED = load_file(DATA / "mmcv_ops.safetensors")


def test_nms_gives_the_bits_of_the_compiled_operator():
    boxes, scores = COMPILED["nms.boxes"], COMPILED["nms.scores"]
    dets, keep = mmcv_ops.nms(boxes, scores, 0.5)
    assert torch.equal(dets, COMPILED["nms.dets"])
    assert torch.equal(keep, COMPILED["nms.keep"])
    dets, keep = mmcv_ops.batched_nms(boxes, scores, COMPILED["bnms.ids"], {"type": "nms", "iou_threshold": 0.5})
    assert torch.equal(dets, COMPILED["bnms.dets"])
    assert torch.equal(keep, COMPILED["bnms.keep"])


@pytest.mark.parametrize("aligned", [0, 1])
@pytest.mark.parametrize("sampling", [0, 2])
def test_roi_align_and_its_gradient_have_the_bits_of_the_compiled_operator(aligned, sampling):
    expected = {key: COMPILED[f"roi.aligned{aligned}.sampling{sampling}.{key}"] for key in ("output", "weight", "grad")}
    features = COMPILED["roi.input"].clone().requires_grad_()
    output = mmcv_ops.roi_align(features, COMPILED["roi.rois"], (7, 5), 0.25, sampling, "avg", bool(aligned))
    (output * expected["weight"]).sum().backward()
    assert torch.equal(output, expected["output"])
    assert torch.equal(features.grad, expected["grad"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_roi_align_in_half_precision_is_the_rounded_one_of_float32(dtype):
    features, rois = COMPILED["roi.input"].to(dtype), COMPILED["roi.rois"]
    half = features.clone().requires_grad_()
    full = features.float().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        output = mmcv_ops.roi_align(half, rois.to(dtype), (7, 5), 0.25, 2, "avg", True)
    expected = mmcv_ops.roi_align(full, rois.to(dtype).float(), (7, 5), 0.25, 2, "avg", True)
    output.sum().backward()
    expected.sum().backward()
    assert output.dtype == dtype
    assert torch.equal(output, expected.to(dtype))
    assert torch.equal(half.grad, full.grad.to(dtype))


def test_the_focal_loss_is_that_of_the_formula():
    # Lin et al. 2017, equation 5, written out; the last class number stands for the background.
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 3, 1])
    p = torch.sigmoid(logits)
    positive = torch.zeros(6, 3, dtype=torch.bool)
    for row, label in enumerate(target):
        if label < 3:
            positive[row, label] = True
    expected = torch.where(positive, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    loss = mmcv_ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(mmcv_ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "mean"), logits)
    (expected_grad,) = torch.autograd.grad(expected.sum() / 6, logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (
            lambda x: mmcv_ops.softmax_focal_loss(x[:, :4], torch.zeros(3, dtype=torch.long)),
            "softmax_focal_loss_forward",
        ),
        (lambda x: mmcv_ops.roi_align(x.view(1, 1, 3, 5), x, (1, 1), 1.0, 0, "max", True), "pool_mode='max'"),
        (lambda x: mmcv_ops.nms(x[:, :4], x[:, 4], 0.5, offset=1), "offset=1"),
        (lambda x: mmcv_ops.soft_nms(x[:, :4], x[:, 4]), "softnms"),
        (
            lambda x: mmcv_ops.sigmoid_focal_loss(
                x, torch.zeros(3, dtype=torch.long), 2.0, 0.25, torch.ones(5), "none"
            ),
            "weights by class",
        ),
    ],
)
def test_what_is_not_covered_is_named_with_the_way_to_compile(call, name):
    with pytest.raises(QsdError, match=r"MMCV_WITH_OPS=1 pip install") as error:
        call(torch.rand(3, 5))
    assert name in str(error.value)


def test_a_compiled_extension_wins(tmp_path, monkeypatch):
    import mmcv

    assert ops.provider().startswith("torchvision")
    (tmp_path / "_ext.py").write_text("compiled = True\n")
    monkeypatch.setattr(mmcv, "__path__", [*mmcv.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.delattr(mmcv, "_ext", raising=False)
    assert importlib.util.find_spec("mmcv._ext").origin == str(tmp_path / "_ext.py")
    assert "compiled" in ops.provider()


def test_a_compiled_extension_that_does_not_load_is_named(tmp_path, monkeypatch):
    import mmcv

    (tmp_path / "_ext.py").write_text("raise ImportError('undefined symbol: _ZN2at')\n")
    monkeypatch.setattr(mmcv, "__path__", [*mmcv.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    with pytest.raises(QsdError, match="undefined symbol"):
        ops.provider()


def test_installing_twice_leaves_one_finder():
    before = len(sys.meta_path)
    ops.install()
    assert len(sys.meta_path) == before


def test_the_environment_report_says_where_operators_come_from():
    assert "torchvision" in mmcv_ops.get_compiler_version()


def test_modules_that_were_imported_before_get_the_operators():
    # mmdet's own tools import it before they read a configuration, and so before `custom_imports`.
    code = """
import mmdet.utils, mmdet.datasets, mmdet.structures.mask.structures as masks
assert masks.roi_align.__module__.startswith("mmdet")
import qsd.mm, mmcv.ops, mmdet.models.dense_heads.rpn_head as rpn
assert masks.roi_align == mmcv.ops.roi_align
assert rpn.batched_nms is mmcv.ops.batched_nms
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
