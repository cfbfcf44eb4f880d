"""Trainings that are killed at random moments, and resumed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from qsd import cli
from qsd.runs import newest_checkpoint, read_run_checkpoint
from tests.helpers import sample
from tests.helpers.training import SMALL

KILLS = sample(1, 20)
EPOCHS, STEPS = sample(1, 3), 5  # steps of an epoch: 20 images in batches of 4


class Progress(Callback):
    """Notes every optimizer step in a file."""

    def on_train_batch_end(self, trainer, *_):
        with open("steps", "a") as file:
            file.write(f"{trainer.global_step}\n")


def _configuration(folder):
    callbacks = [
        {"class_path": "tests.runs.test_kills.Progress"},
        {"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.9, "use_buffers": True}},
        {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/loss", "filename": "best"}},
        {"class_path": "ModelCheckpoint", "init_args": {"filename": "last", "enable_version_counter": False}},
        {
            "class_path": "ModelCheckpoint",
            "init_args": {"filename": "step", "every_n_train_steps": 2, "enable_version_counter": False},
        },
    ]
    model = {"model": "qsd_tiny", "model_args": {k: list(v) if isinstance(v, tuple) else v for k, v in SMALL.items()}}
    model |= {"optimizer": "adamw", "base_lr": 0.05, "warmup_epochs": 1}
    config = {
        "model": {"class_path": "qsd.tasks.ClassificationTask", "init_args": model},
        "data": {
            "class_path": "tests.helpers.training.FewDigits",
            "init_args": {"batch_size": 4, "num_workers": 0},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": EPOCHS,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "killed"}}],
            "callbacks": callbacks,
        },
    }
    (folder / "killed.yaml").write_text(yaml.safe_dump(config))


def _run(*options, seconds=None):
    """Train in a process of its own, which has all libraries, and kill it after some time."""
    process = os.fork()
    if process == 0:
        log = os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os._exit(cli.main(["fit", "--config", "killed.yaml", *options]))
    start = time.monotonic()
    while seconds is None or time.monotonic() < start + seconds:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _weights():
    # A training that is killed between the last two files of its end has nothing left to do, and writes no `last.ckpt`.
    saved = read_run_checkpoint(newest_checkpoint([Path("runs/killed")]))
    return saved["global_step"], {**saved["state_dict"], **saved["current_model_state"]}


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_killed_trainings_lose_no_more_than_the_steps_since_their_checkpoint(tmp_path, monkeypatch, capsys):
    folders = [tmp_path / str(number) for number in range(KILLS + 1)]
    for folder in folders:
        folder.mkdir()
        _configuration(folder)
    monkeypatch.chdir(folders[0])
    start = time.monotonic()
    assert _run() == 0, Path("log").read_text()
    duration = time.monotonic() - start
    steps, whole = _weights()
    assert steps == EPOCHS * STEPS
    rng, lost, without = random.Random(0), [], 0
    for folder in folders[1:]:
        monkeypatch.chdir(folder)
        code = _run(seconds=rng.uniform(0.1, 1.0) * duration)
        assert code in (0, -signal.SIGKILL)
        done = [int(line) for line in Path("steps").read_text().split()] if Path("steps").exists() else [0]
        files = [path for path in folder.rglob("*") if path.is_file() and "checkpoints" in path.parts]
        for path in files:
            read_run_checkpoint(path)  # every file is a complete checkpoint
        resume = ["--ckpt_path=last"] if files else []
        without += not files
        saved = read_run_checkpoint(newest_checkpoint([Path("runs/killed")]))["global_step"] if files else 0
        lost.append(done[-1] - saved)
        assert lost[-1] <= 2, (done, saved)
        assert _run(*resume) == 0, Path("log").read_text()
        steps, resumed = _weights()
        assert steps == EPOCHS * STEPS
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    with capsys.disabled():
        print(f"\n{KILLS} runs of {duration:.1f} s killed; steps lost: {lost}; {without} before any checkpoint")
