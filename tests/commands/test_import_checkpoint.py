"""``qsd import-checkpoint``, from the user's end."""

import argparse
import json
from pathlib import Path

import pytest
import timm
import torch

from qsd import cli
from qsd.commands import import_checkpoint
from qsd.tasks import ClassificationTask
from tests.helpers import ROOT
from tests.helpers.published_e_spikeformer import published_state


@pytest.fixture
def reference(tmp_path, reference_state, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {f"module.{k}": v for k, v in reference_state.items()}}, "reference.pth")
    return Path("reference.pth")


def test_an_imported_checkpoint_is_validated_tested_and_trained_on(reference, write_tree, tmp_path):
    tree = write_tree(tmp_path / "ten", {p: {f"c{i}": 1 for i in range(10)} for p in ("train", "val")})
    assert import_checkpoint.main(["reference.pth", "imported.ckpt", "--num-heads", "4"]) == 0
    quick = [
        "--data.root", str(tree), "--data.img_size=32", "--data.num_workers=0", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--ckpt_path=imported.ckpt",
    ]  # fmt: skip
    for command in ("validate", "test"):
        assert cli.main([command, "--data=ImageFolderData", *quick]) == 0
    config = ["--config", str(ROOT / "configs/imagenet.yaml"), "--trainer.max_epochs=1", "--model.base_lr=0.123"]
    assert cli.main(["fit", *config, *quick, "--trainer.precision=32"]) == 0
    trained = torch.load("runs/imagenet/version_0/checkpoints/last.ckpt", weights_only=True)
    assert trained["global_step"] == 1
    assert trained["hyper_parameters"]["base_lr"] == 0.123  # the configuration's, not the imported file's
    assert trained["hyper_parameters"]["model_args"]["embed_dims"] == [8, 16, 24, 32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pth", "out.ckpt"], "checkpoint missing.pth does not exist"),
        (["reference.pth", "there.ckpt"], "there.ckpt exists; pass --force"),
        (["other.pth", "out.ckpt"], "no checkpoint of the published"),
        (["reference.pth", "out.ckpt", "--num-heads=7"], "not divisible by num_heads=7"),
    ],
)
def test_mistakes_give_one_line_and_leave_nothing(reference, capsys, arguments, message):
    Path("there.ckpt").write_text("precious")
    torch.save({"model": {"conv.weight": torch.zeros(3)}}, "other.pth")
    assert import_checkpoint.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out.ckpt").exists()
    assert Path("there.ckpt").read_text() == "precious"


@pytest.mark.parametrize("name", ["V3_5.1M_1x8.pth", "plain.pth"])
def test_a_checkpoint_of_e_spikeformer_brings_its_levels_and_float_weights(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("e_spikeformer_83m", embed_dims=(8, 8, 16), depth=1, num_heads=4, num_classes=5)
    torch.save({"model": published_state(model), "args": argparse.Namespace(kd=True)}, name)
    assert import_checkpoint.main([name, "out.ckpt", "--num-heads=4"]) == 0
    assert "out.ckpt: e_spikeformer_83m" in capsys.readouterr().out
    parameters = torch.load("out.ckpt", weights_only=True)["hyper_parameters"]
    assert parameters["model_args"].get("time_steps") == (8 if "1x8" in name else None)
    assert parameters["model_args"]["weight_bits"] == 0
    task = ClassificationTask.load_from_checkpoint("out.ckpt")
    assert torch.equal(task.model.head_kd.weight, model.head_kd.weight)
    assert import_checkpoint.main([name, "out.ckpt", "--num-heads=4", "--time-steps=2", "--force"]) == 0
    assert torch.load("out.ckpt", weights_only=True)["hyper_parameters"]["model_args"]["time_steps"] == 2


def test_configurations_are_valid_json_once_dumped(reference):
    import_checkpoint.main(["reference.pth", "imported.ckpt", "--num-heads", "4"])
    json.dumps(torch.load("imported.ckpt", weights_only=True)["hyper_parameters"])
