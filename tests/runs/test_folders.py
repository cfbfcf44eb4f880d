"""A run's folder belongs to one run."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from qsd import QsdError
from qsd.runs import claim, claim_for_loggers, find_checkpoint, newest_checkpoint, place_checkpoints, run_folder
from tests.helpers.files import save_payload


def test_runs_that_start_at_once_get_a_folder_each(tmp_path):
    roots = [tmp_path / "a", tmp_path / "b"]
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda _: claim(roots).version, range(24)))
    assert sorted(versions) == list(range(24))
    assert all((root / f"version_{number}").is_dir() for root in roots for number in range(24))


def test_a_taken_name_gets_the_next_free_one_and_an_unused_folder_goes(tmp_path):
    assert claim([tmp_path], 3).version == 3
    assert claim([tmp_path]).version == 4
    assert claim([tmp_path], 3).version == 5
    assert claim([tmp_path], 0).version == 0
    assert [claim([tmp_path], "night").version for _ in range(3)] == ["night", "night-1", "night-2"]
    used, unused = claim([tmp_path / "x" / "y"]), claim([tmp_path / "z" / "y"])
    (used.made[-1] / "file").touch()
    used.release()
    unused.release()
    assert (tmp_path / "x/y/version_0/file").exists()
    assert not (tmp_path / "z").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(QsdError, match="no folder for this run can be made") as error:
        claim([tmp_path / "runs" / "digits"])
    assert "\n" not in str(error.value)


def test_all_loggers_of_a_run_get_one_number(tmp_path, capsys):
    (tmp_path / "b" / "version_6").mkdir(parents=True)
    loggers = [CSVLogger(tmp_path, "a"), TensorBoardLogger(tmp_path, "b"), DummyLogger()]
    claim_for_loggers(loggers)
    assert [logger.version for logger in loggers[:2]] == [7, 7]
    claim_for_loggers([again := CSVLogger(tmp_path, "a", version=7)])  # a saved configuration of version 0.1.0
    assert again.version == 8
    assert "belongs to another run; this one takes version_8" in capsys.readouterr().out


class Elsewhere(DummyLogger):
    """Like W&B or MLflow: no ``log_dir``, and here without an identifier that is new each time."""

    save_dir, name, version = "logs", "project", "abc"


def test_a_logger_without_a_folder_gets_one_for_each_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainers = [L.Trainer(accelerator="cpu", logger=Elsewhere(), callbacks=[ModelCheckpoint()]) for _ in range(3)]
    folders = [str(run_folder(trainer)) for trainer in trainers]
    assert folders == ["logs/project/abc", "logs/project/abc-1", "logs/project/abc-2"]
    assert str(run_folder(trainers[0])) == folders[0]
    place_checkpoints(trainers[1], run_folder(trainers[1]), None)
    assert trainers[1].checkpoint_callback.dirpath == "logs/project/abc-1/checkpoints"
    both = L.Trainer(accelerator="cpu", logger=[Elsewhere(), CSVLogger("logs", "name", 4)])
    assert str(run_folder(both)) == "logs/name/version_4"
    assert run_folder(L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)) == tmp_path


def test_a_chosen_folder_with_checkpoints_of_another_training_is_refused(tmp_path):
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[ModelCheckpoint(tmp_path)])
    place_checkpoints(trainer, tmp_path, None)
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(QsdError, match="holds checkpoints of another training"):
        place_checkpoints(trainer, tmp_path, None)
    place_checkpoints(trainer, tmp_path, str(tmp_path / "last.ckpt"))


def _save(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6", **content}, path)
    return path


def test_the_newest_undamaged_checkpoint_of_a_name_is_found(tmp_path, caplog):
    runs = tmp_path / "runs" / "digits"
    with pytest.raises(QsdError, match="ckpt_path='last' finds no checkpoint in"):
        newest_checkpoint([runs])
    paths = [_save(runs / f"version_{i}/checkpoints/last.ckpt") for i in range(3)]
    (runs / "version_7").mkdir()  # of an evaluation
    (runs / "version_2/checkpoints/.unfinished.ckpt").touch()
    assert newest_checkpoint([runs]) == paths[2]
    paths[2].write_bytes(paths[2].read_bytes()[:100])
    assert newest_checkpoint([runs]) == paths[1]
    assert "version_2" in caplog.text
    save_payload(paths[1], tmp_path / "mark", state_dict={})
    assert newest_checkpoint([runs]) == paths[0]
    assert not (tmp_path / "mark").exists()
    paths[0].write_bytes(b"")
    with pytest.raises(QsdError, match=r"none of the 3 checkpoint\(s\)"):
        newest_checkpoint([runs])


def _logger(kind, **options):
    return SimpleNamespace(class_path=f"lightning.pytorch.loggers.{kind}", get=lambda _: options)


def test_the_name_of_a_run_is_that_of_its_logger(tmp_path):
    root = str(tmp_path)
    places = {
        "digits/version_0": [_logger("CSVLogger", save_dir=root, name="digits")],
        "lightning_logs/version_2": None,
        "version_1": False,
        "wandb/xyz": [_logger("WandbLogger", save_dir=root, project="wandb")],
    }
    saved = {place: _save(tmp_path / place / "checkpoints" / "last.ckpt") for place in places}
    for place, loggers in places.items():
        trainer = {"default_root_dir": root, "logger": loggers}
        assert find_checkpoint("last", trainer) == saved[place], place
    with pytest.raises(QsdError, match="ckpt_path='hpc'"):
        find_checkpoint("hpc", {"default_root_dir": root})
    newest = [_save(tmp_path / f"hpc_ckpt_{number}.ckpt") for number in (2, 10, 9)][1]
    assert find_checkpoint("hpc", {"default_root_dir": root}) == newest
