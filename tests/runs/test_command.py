"""Runs and their folders from the command line."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from qsd import cli
from tests.helpers import ROOT, sample
from tests.helpers.files import full_disk

SMALL = {"embed_dims": [8, 8, 8, 8], "num_heads": 2, "depth": 2}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def run(tree, tmp_path, monkeypatch, capsys):
    """Run a subcommand on a few images, and return its exit code and output."""
    monkeypatch.chdir(tmp_path)
    options = [
        "--config", str(ROOT / "configs/imagenet.yaml"), f"--data.root={tree}", "--data.img_size=32",
        "--data.batch_size=4", f"--model.model_args={json.dumps(SMALL)}", "--trainer.precision=32",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        "--data.num_workers=0",
    ]  # fmt: skip

    def call(subcommand, *more):
        capsys.readouterr()
        code = cli.main([subcommand, *options, *more])
        return code, "".join(capsys.readouterr())

    return call


def _content(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_no_run_touches_the_files_of_another(run, capsys):
    assert run("fit", "--trainer.max_epochs=1")[0] == 0
    first = _content("runs/imagenet/version_0")
    assert {path.name for path in first} >= {"config.yaml", "best.ckpt", "last.ckpt", "metrics.csv"}
    saved = yaml.safe_load(Path("runs/imagenet/version_0/config.yaml").read_text())
    assert all(logger["init_args"]["version"] is None for logger in saved["trainer"]["logger"])

    assert cli.main(["fit", "--config", "runs/imagenet/version_0/config.yaml"]) == 0
    assert _content("runs/imagenet/version_0") == first
    assert Path("runs/imagenet/version_1/checkpoints/last.ckpt").is_file()

    # without loggers, where one run has been
    Path("runs/version_0").mkdir()
    assert run("fit", "--trainer.max_epochs=1", "--trainer.logger=false", "--trainer.callbacks=null")[0] == 0
    assert {"config.yaml", "checkpoints"} <= {path.name for path in Path("runs/version_1").iterdir()}
    assert not list(Path("runs/version_0").iterdir())


def test_last_is_the_newest_run_of_this_name_or_is_refused(run, monkeypatch):
    for subcommand in sample(("fit", "predict"), ("fit", "validate", "test", "predict")):
        code, said = run(subcommand, "--ckpt_path=last")
        assert code == 2
        assert "ckpt_path='last' finds no checkpoint in runs/imagenet" in said
    assert not Path("runs").exists()
    assert run("fit", "--trainer.max_epochs=1")[0] == 0
    last = "runs/imagenet/version_0/checkpoints/last.ckpt"
    code, said = run("validate", "--ckpt_path=last")
    assert code == 0
    assert f"checkpoint: {last}" in said
    code, said = run("fit", "--ckpt_path=last", "--trainer.max_epochs=2", "--model.base_lr=0.5")
    assert code == 0
    assert f"checkpoint: {last}" in said
    newest = Path("runs/imagenet/version_2/checkpoints/last.ckpt")  # the evaluation has taken version_1
    resumed = torch.load(newest, weights_only=True)
    assert resumed["epoch"] == 1
    assert resumed["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.5 * 4 / 256  # the setting counts

    # SIGTERM ends an evaluation at once
    monkeypatch.setattr(
        "qsd.tasks.ClassificationTask.predict_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or signal.pause()
    )
    code, said = run("predict", "--ckpt_path=last")
    assert code == 143
    assert f"checkpoint: {newest}" in said
    assert not list(Path("runs").rglob("*predictions*"))


def test_a_stopped_training_says_how_it_goes_on(run):
    stop = "--trainer.callbacks+=tests.helpers.training.Terminate"
    code, said = run("fit", "--trainer.max_epochs=2", stop)
    assert code == 143
    path = "runs/imagenet/version_0/checkpoints/interrupted.ckpt"
    assert f"qsd: stopped by SIGTERM; go on with --ckpt_path {path}" in said
    assert "Traceback" not in said
    code, said = run("fit", "--trainer.max_epochs=1", "--ckpt_path=last")
    assert code == 0
    assert f"checkpoint: {path}" in said
    assert Path("runs/imagenet/version_1/checkpoints/best.ckpt").is_file()


def test_faults_of_the_disk_are_one_line(run, monkeypatch):
    with full_disk():
        code, said = run("fit", "--trainer.max_epochs=1")
    assert code == 2
    assert said.count("qsd: error: ") == 1
    assert "cannot be written" in said
    assert not list(Path().rglob("*.ckpt"))
    Path("file").touch()
    code, said = run("fit", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=file")
    assert code == 2
    assert "no folder for this run can be made" in said


def test_a_killed_data_loading_process_is_one_line_wherever_pytorch_tells_it(run, monkeypatch):
    def step(*_):
        raise RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed.")

    monkeypatch.setattr("qsd.tasks.ClassificationTask.training_step", step)
    code, said = run("fit", "--trainer.max_epochs=1")
    assert code == 2
    assert "qsd: error: a data-loading process was ended by the system" in said
