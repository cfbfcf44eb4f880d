"""The tools around distillation, from the user's end: teacher and student, the analysis, the ablation."""

import json
from pathlib import Path

import pytest
import torch

from qsd.commands import analyze as analyze_command
from tests.helpers import ROOT, long

SIZES = {"embed_dims": [8, 8, 8, 8], "num_heads": 2, "depth": 2, "strides": [2, 2, 1, 2, 1]}  # of both networks
SHORT = [
    "--model.model_args=" + json.dumps(SIZES), "--trainer.log_every_n_steps=1",
    "--data.num_workers=0", "--data.batch_size=16", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tool):
    """A folder in which ``tools/distill.py`` has trained a teacher and a student."""
    folder = tmp_path_factory.mktemp("distilled")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert tool("distill").main(SHORT) == 0
    return folder / "runs"


@long
def test_one_command_trains_the_teacher_and_then_the_student(runs, tool, monkeypatch, capsys):
    teacher = torch.load(runs / "digits_teacher/version_0/checkpoints/best.ckpt", weights_only=True)
    student = torch.load(runs / "digits_distill/version_0/checkpoints/best.ckpt", weights_only=True)
    assert teacher["hyper_parameters"]["model"] == "qsd_tiny_ann"
    assert student["hyper_parameters"]["model"] == "qsd_tiny"
    metrics = (runs / "digits_distill/version_0/metrics.csv").read_text().splitlines()[0]
    assert "train/loss_query" in metrics
    assert "spikes/rate" in metrics
    assert (runs / "digits_distill/version_0/report.html").is_file()  # converted behind it
    monkeypatch.chdir(runs.parent)
    again = "runs/digits_teacher/version_0/checkpoints/best.ckpt"
    assert tool("distill").main(["--teacher", again, *SHORT, "--model.base_lr=0.001"]) == 0
    assert not (runs / "digits_teacher/version_1").exists()
    assert again in "".join(capsys.readouterr().out.replace("│", "").split())
    assert tool("distill").main(["abacus"]) == 2
    assert "configuration configs/abacus.yaml does not exist" in capsys.readouterr().err


@long
def test_attention_is_analysed_on_the_images_of_the_training(runs, tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    analyze = analyze_command.main
    student = str(runs / "digits_distill/version_0/checkpoints/best.ckpt")
    teacher = str(runs / "digits_teacher/version_0/checkpoints/best.ckpt")
    assert analyze([student, teacher, "--teacher", teacher, "--max-images=64", "--device=cpu"]) == 0
    assert "page: attention/attention.html" in capsys.readouterr().out
    record = json.loads(Path("attention/attention.json").read_text())
    assert [n["label"] for n in record["networks"]] == ["digits_distill/version_0", "digits_teacher/version_0"]
    assert record["networks"][0]["images"] == 64
    assert record["networks"][0]["signals"][0]["max_entropy"] == pytest.approx(2.3219, abs=1e-4)
    assert record["means"]["teacher_distance"][1] == pytest.approx(0, abs=1e-6)
    assert not list(Path("attention").glob("*.part"))

    def fails(*arguments):
        assert analyze(list(arguments)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "attention/attention.json exists; pass --force" in fails(student)
    config = ["--config", str(ROOT / "configs/digits.yaml")]
    assert "2 labels for 1 checkpoints" in fails(student, "--labels", "a", "b", "--out=other")
    assert "checkpoint nothing.ckpt does not exist" in fails("nothing.ckpt", "--out=other", *config)
    assert "data" in fails("nothing.ckpt", "--out=other")  # neither a run's configuration nor --data
    assert not Path("other").exists()


def test_the_ablation_goes_on_where_it_stopped_and_mixes_no_settings(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qsd.data.digits.SIZES", {"train": 40, "val": 20, "test": 20})
    module = tool("ablation")
    trained = []

    def stop_after_three(run, *arguments):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(run.name)
        return original(run, *arguments)

    original = module.train
    monkeypatch.setattr(module, "train", stop_after_three)
    quick = ["--bits=4", "--seeds=1", "--epochs=1", "--images=30", "--batch-size=10", "--workers=0"]
    assert module.main(quick) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert trained == ["teacher-s0", "t1-w4-s0", "t1-w4-distilled-s0"]
    monkeypatch.setattr(module, "train", lambda run, *rest: trained.append(run.name) or original(run, *rest))
    assert module.main(quick) == 0
    assert trained[3:] == ["t4-w4-s0", "t4-w4-distilled-s0"]
    out = capsys.readouterr().out
    assert "Test accuracy in %, 30 training images" in out
    assert "multi-level spikes, distilled" in out
    results = [json.loads(p.read_text()) for p in Path("runs/ablation").glob("t*.json")]
    assert all(0 <= r["test"] <= 1 and 0 <= r["val"] <= 1 for r in results)
    assert {(r["time_steps"], r["weight_bits"], r["distilled"]) for r in results} == {
        (None, None, False), (1, 4, False), (1, 4, True), (4, 4, False), (4, 4, True),
    }  # fmt: skip
    assert Path("runs/ablation/ablation.svg").read_text().count("<path") > 10
    assert module.main([*quick, "--epochs=2"]) == 2
    assert "holds results of other settings" in capsys.readouterr().err


def test_the_ablation_s_table_pairs_seeds(tool):
    module = tool("ablation")
    results = [
        {"seed": s, "time_steps": t, "weight_bits": 4, "distilled": d, "val": 0.0, "test": test}
        for s, rows in enumerate([((1, False, 0.70), (1, True, 0.74)), ((1, False, 0.80), (1, True, 0.86))])
        for t, d, test in rows
    ]
    gains = module.gain(results, (1, 4, False), (1, 4, True))
    assert gains == pytest.approx({0: 4, 1: 6})
    assert module.spread(gains, "+") == "+5.00 ± 1.41"
    assert module.spread({}) == ""
    assert module.spread({0: 3.0}) == "3.00"


def test_a_comparison_needs_a_configuration(tool, capsys):
    assert tool("compare_activations").main(["--config", "nothing.yaml"]) == 2
    assert "configuration nothing.yaml does not exist" in capsys.readouterr().err
