"""Two CPU processes against one."""

import csv
import json
import os
import runpy
import subprocess
import sys

import pytest
import timm
import torch

from qsd import cli
from tests.helpers import ROOT, long

SIZES = {"embed_dims": [8, 8, 8, 8], "num_heads": 2, "depth": 3}
SMALL = "--model.model_args=" + json.dumps(SIZES)
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="gloo is not built in")


def run(*command, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@long
def test_averaged_gradients_of_two_processes_equal_those_of_one_with_a_teacher_too(tmp_path, monkeypatch):
    twin = timm.create_model("qsd_tiny_ann", num_classes=10, in_chans=1, layer_scale=0.5, **SIZES)
    torch.save(twin.state_dict(), tmp_path / "teacher.pth")
    program = ROOT / "tests/programs/one_step.py"
    run(program, 2, "2.pt", "teacher.pth", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program), "1", "1.pt", "teacher.pth"])
    runpy.run_path(str(program), run_name="__main__")
    one, two = torch.load("1.pt"), torch.load("2.pt")
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert gradient.dtype == torch.float64
        assert (gradient - two[name]).abs().max() <= 1e-9 * max(1, gradient.abs().max()), name


def test_two_processes_train_and_validate_every_image_once(tree, write_tree, tmp_path, monkeypatch):
    # Five images to validate: the set divides neither by processes nor by batches, and the batches are unequal. What
    # training has beside it is there too: averages, a teacher, statistics.
    torch.save(timm.create_model("qsd_15m_ann", num_classes=2, **SIZES).state_dict(), tmp_path / "teacher.pth")
    common = [
        "--data.root", tree, "--data.img_size=32", "--data.num_workers=0", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    ]  # fmt: skip
    config = ["--config", ROOT / "configs/imagenet.yaml"]
    fit = [
        "--data.batch_size=2",
        "--trainer.max_epochs=2",
        "--trainer.precision=32",
        "--trainer.log_every_n_steps=1",
        "--trainer.callbacks+=EMAWeightAveraging",
        "--trainer.callbacks+=qsd.callbacks.SpikeStatistics",
        "--trainer.callbacks+=qsd.callbacks.Distillation",
        "--trainer.callbacks.init_args.teacher=qsd_15m_ann",
        "--trainer.callbacks.init_args.teacher_weights=teacher.pth",
        f"--trainer.callbacks.init_args.teacher_args={json.dumps(SIZES)}",
    ]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    run("-m", "qsd", "fit", *config, *common, SMALL, *fit, *two, cwd=tmp_path)
    checkpoints = tmp_path / "runs/imagenet/version_0/checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 4  # eleven images: 2 x 2 x 2
    header = (tmp_path / "runs/imagenet/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss_query", "spikes/rate"} <= set(header)
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.init_args.save_dir=logs", "--data.batch_size=1"]
    data = ["--data=ImageFolderData", *common, *logger, "--ckpt_path", checkpoints / "last.ckpt"]
    monkeypatch.chdir(tmp_path)
    two[-1] += "_fork"  # of this process, which has all libraries; the training has shown that two find each other
    for name, options in (("one", []), ("two", two)):
        arguments = [*map(str, data), *options, f"--trainer.logger.init_args.name={name}"]
        assert cli.main(["validate", *arguments]) == 0
    metrics = []
    for name in ("one", "two"):
        with (tmp_path / f"logs/{name}/version_0/metrics.csv").open() as file:
            (row,) = csv.DictReader(file)
        metrics.append(row)
    assert metrics[0]["val/accuracy"] == metrics[1]["val/accuracy"]
    assert float(metrics[0]["val/loss"]) == pytest.approx(float(metrics[1]["val/loss"]), rel=1e-6)


@long
def test_two_processes_agree_on_the_steps_that_their_first_batches_give(tmp_path):
    run(ROOT / "tests/programs/neuron_steps.py", tmp_path / "steps", cwd=tmp_path)
    one, two = (torch.load(tmp_path / f"steps.{rank}.pt") for rank in (0, 1))
    assert len({step.item() for step in one.values()}) > 5  # no longer what the constructor gave
    assert all(torch.equal(step, two[name]) for name, step in one.items())


@long
def test_fewer_images_than_processes_are_named(tmp_path, write_tree):
    tree = write_tree(tmp_path / "small", {"train": {"cat": 4, "dog": 4}, "val": {"cat": 1}})
    command = [
        "-m", "qsd", "fit", "--data=ImageFolderData", "--data.root", tree, "--data.img_size=32", SMALL,
        "--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2", "--data.num_workers=0",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "qsd: error: " in done.stderr
    assert "processes" in done.stderr
