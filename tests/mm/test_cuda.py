"""Operators, mixed precision and synchronised batch norms of detectors on a CUDA device; skipped elsewhere."""

import json

import pytest
import torch
from mmengine.optim import AmpOptimWrapper
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port

from qsd.mm import command
from tests.helpers import CONFIGS
from tests.helpers.mm import ADE_SCALES, COCO_SCALES, ONE_PROCESS, scalars

from .test_ops import COMPILED, mmcv_ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def test_nms_keeps_what_it_keeps_on_a_processor():
    boxes, scores = COMPILED["nms.boxes"].cuda(), COMPILED["nms.scores"].cuda()
    assert torch.equal(mmcv_ops.nms(boxes, scores, 0.5)[1].cpu(), COMPILED["nms.keep"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_roi_align_and_its_gradient_are_those_of_a_processor(dtype):
    values, regions = COMPILED["roi.input"].to(dtype), COMPILED["roi.rois"].to(dtype)
    weight = COMPILED["roi.aligned1.sampling2.weight"]
    results = []
    for device, wide in (("cpu", torch.float32), ("cuda", dtype)):
        features = values.to(device, wide, copy=True).requires_grad_()
        with torch.autocast(device, dtype, enabled=wide != torch.float32):
            output = mmcv_ops.roi_align(features, regions.to(device, wide), (7, 5), 0.25, 2, "avg", True)
        (output.float() * weight.to(device)).sum().backward()
        assert output.dtype == features.grad.dtype == wide
        results.append((output.detach().float().cpu(), features.grad.float().cpu()))
    for exact, found in zip(*results, strict=True):  # one rounding of the output, one of the gradient it gets
        assert (found - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_the_focal_loss_and_its_gradient_are_those_of_a_processor():
    logits, target = torch.randn(50, 7, dtype=torch.float64), torch.randint(0, 8, (50,))
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        x = logits.to(device).requires_grad_()
        losses.append(mmcv_ops.sigmoid_focal_loss(x, target.to(device), 2.0, 0.25, None, "mean"))
        gradients.append(torch.autograd.grad(losses[-1], x)[0].cpu())
    torch.testing.assert_close(losses[0], losses[1].cpu(), rtol=1e-12, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("config", ["coco_qsd", "ade20k_qsd"])
def test_mixed_precision_and_synchronised_norms_train_and_convert(config, coco, ade, tool, tmp_path, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", str(get_free_port()))  # what torchrun sets, for one process
    runners, build = [], command.build_runner
    monkeypatch.setattr(command, "build_runner", lambda *inputs: runners.append(build(*inputs)) or runners[-1])
    detects = config == "coco_qsd"
    options = [f"data_root={coco if detects else ade}", "train_dataloader.batch_size=2", *ONE_PROCESS]
    options += ["train_cfg.max_epochs=1"] if detects else ["train_cfg.max_iters=2", "train_cfg.val_interval=2"]
    options += COCO_SCALES if detects else [*ADE_SCALES, "default_hooks.checkpoint.interval=2"]
    options += ["default_hooks.logger.interval=1"]
    hook = {"type": "ConvertToSpikeDrivenHook", "max_images": 2, "step_images": 1}
    file = tmp_path / "converts.py"
    file.write_text(f'_base_ = ["{CONFIGS / config}.py"]\ncustom_hooks = [{hook}]\n')
    arguments = [str(file), "--launcher", "pytorch", "--amp", "--work-dir", str(tmp_path / "run")]
    program = tool("mmdet_train" if detects else "mmseg_train")
    assert program.main([*arguments, "--traceback", "--cfg-options", *options]) == 0
    (runner,) = runners
    assert isinstance(runner.optim_wrapper, AmpOptimWrapper)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in runner.model.modules())
    losses = [line["loss"] for line in scalars(tmp_path / "run") if "loss" in line]
    assert len(losses) == 2
    assert torch.tensor(losses).isfinite().all()
    record = json.loads((tmp_path / "run/conversion.json").read_text())
    assert record["comparison"][0]["changed_images"] == 0
