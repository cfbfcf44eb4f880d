"""Two CPU processes, for detection with loading processes of their own, that are spawned."""

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers import CONFIGS, long, sample
from tests.helpers.mm import ADE_SCALES, COCO_SCALES, scalars

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="gloo is not built in")
SMALL = [
    'model.backbone.model_args.embed_dims="(8,8,16,16)"', "model.backbone.model_args.num_heads=2",
    "model.neck.in_channels=[8,8,16,16]", "model.backbone.model_args.depth=2",
]  # fmt: skip


@long
@pytest.mark.parametrize("config", sample(["ade20k_qsd"], ["coco_qsd", "ade20k_qsd"]))
def test_two_processes_train_and_validate(config, coco, ade, tmp_path):
    detects = config == "coco_qsd"
    length = ["train_cfg.max_epochs=1"] if detects else ["train_cfg.max_iters=2", "train_cfg.val_interval=2"]
    options = [f"data_root={coco if detects else ade}", "train_dataloader.batch_size=1", *length, *SMALL]
    # Spawned ones import all of OpenMMLab anew.
    options += [f"train_dataloader.num_workers={int(detects)}", "val_dataloader.num_workers=0"]
    options += [f"{part}_dataloader.persistent_workers=False" for part in ("train", "val")]
    options += ["env_cfg.mp_cfg.mp_start_method=spawn"] if detects else []
    options += ["model.roi_head.bbox_head.fc_out_channels=32"] if detects else []
    options += COCO_SCALES if detects else [*ADE_SCALES, "default_hooks.checkpoint.interval=2"]
    tool = CONFIGS.parent / "tools" / ("mmdet_train.py" if detects else "mmseg_train.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tool]
    command += [CONFIGS / f"{config}.py", "--launcher", "pytorch", "--work-dir", tmp_path, "--cfg-options", *options]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=280, env=environment)
    raised = [line for line in done.stderr.splitlines() if "Error" in line or "error:" in line]  # of each process
    assert done.returncode == 0, "\n".join(raised)
    (checkpoint,) = tmp_path.glob("*.pth")
    # Four images, one for each process and step.
    assert checkpoint.stem == ("epoch_1" if detects else "iter_2")
    assert torch.load(checkpoint, weights_only=False)["meta"]["iter"] == 2
    assert "spikes/rate" in scalars(tmp_path)[-1]
