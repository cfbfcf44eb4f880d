"""Conversion at the end of a training and by ``qsd convert``, and every way in which it may fail."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

import qsd
from qsd import QsdError, cli, report
from qsd.callbacks import ConvertToSpikeDriven
from qsd.commands import convert as convert_command
from qsd.commands import run as run_command
from qsd.data import DigitsData
from qsd.runs import RunRecord
from qsd.tasks import ClassificationTask, load_task
from tests.helpers import ROOT, long, sample

SMALL = {
    "embed_dims": [8, 8, 8, 8],
    "num_heads": 2,
    "depth": 2,
    "time_steps": 2,
    "strides": [1, 2, 2, 2, 1],
    "layer_scale": 0.5,
}
QUICK = {"max_images": 8, "step_images": 4, "stages": ["compare"]}
IMAGES = 8


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_task(**kwargs):
    return ClassificationTask(
        "qsd_tiny", **{"model_args": SMALL, "optimizer": "adamw", "base_lr": 0.05, "warmup_epochs": 1, **kwargs}
    )


def fit(folder, callbacks, task=None, **kwargs):
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "limit_train_batches": 2, "logger": False, **kwargs},
    )
    trainer.fit(task or make_task(), DigitsData(img_size=16, batch_size=8))
    return trainer


def best(folder="."):
    return ModelCheckpoint(folder, "best", monitor="val/loss")


def test_the_best_averaged_weights_are_converted_verified_and_logged(tmp_path, capsys):
    loggers = [CSVLogger("runs", "x", 0), TensorBoardLogger("runs", "x", 0)]
    callbacks = [
        ConvertToSpikeDriven(max_images=IMAGES, step_images=4, float_accuracy=0.5),
        EMAWeightAveraging(decay=0.5),
        best(),
    ]
    # two epochs at a rate that breaks what the first one learned: the last weights are not the best ones
    fit(tmp_path, callbacks, logger=loggers, max_epochs=2, precision="bf16-mixed")
    run = Path("runs/x/version_0")
    record = json.loads((run / "conversion.json").read_text())
    assert record["accuracy"]["images"] == IMAGES
    assert record["accuracy"]["float"] == 0.5
    assert record["model"]["checkpoint"] == callbacks[2].best_model_path
    assert record["data"]["description"] == "8 validation images of DigitsData"
    assert record["comparison"][0]["changed_images"] == 0

    # the packed network is that of the checkpoint's averages, which are not the raw weights
    checkpoint = torch.load("best.ckpt", weights_only=True)
    averages, raw = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert any(not torch.equal(raw[name], tensor) for name, tensor in averages.items())
    trained = make_task(num_classes=10, model_args={**SMALL, "in_chans": 1})
    trained.configure_model()
    trained.load_state_dict(averages)
    images = torch.randn(3, 1, 16, 16)
    packed = qsd.load_packed(run / "spiking.safetensors")
    assert torch.equal(packed(images), qsd.to_spike_driven(trained.model.eval())(images))

    rows = list(csv.DictReader((run / "metrics.csv").open()))
    logged = {name: float(row[name]) for row in rows for name in row if name.startswith("spiking/") and row[name]}
    assert logged == pytest.approx(report.metrics(report.Record.read(run / "conversion.json")), rel=1e-5)
    assert list(run.glob("events*"))
    assert "report: " in capsys.readouterr().out
    assert not list(tmp_path.rglob(".unfinished-*"))


def digits(*more):
    return [
        "fit", "--config", str(ROOT / "configs/digits.yaml"), f"--model.model_args={json.dumps(SMALL)}",
        "--data.img_size=16", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--data.batch_size=8",
        "--trainer.limit_val_batches=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false", *more,
    ]  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_a_conversion_that_fails_loses_nothing_and_says_so(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("out of something")

    monkeypatch.setattr("qsd.report.classifier.save_packed", fail)
    assert cli.main(digits()) == 2
    run = Path("runs/digits/version_0")
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"qsd: error: the trained network is safe in {run / 'checkpoints/best.ckpt'}")
    assert "its conversion failed: RuntimeError: out of something" in message
    assert {file.name for file in run.iterdir()} >= {"checkpoints", "metrics.csv"}
    record = RunRecord.read(run / "run.json")
    assert (record.stage, record.epochs, record.best) == ("fit", 1, "checkpoints/best.ckpt")
    assert "val/accuracy" in record.metrics
    assert not {*report.FILES, *(f.name for f in run.glob(".unfinished*"))} & {file.name for file in run.iterdir()}
    for name in ("best", "last"):
        assert load_task(next(Path().rglob(f"{name}.ckpt"))).model is not None


def test_a_float_twin_is_left_as_it_is(tmp_path):
    with pytest.warns(UserWarning, match="no spiking neurons"):
        fit(tmp_path, [ConvertToSpikeDriven()], make_task(model_args={**SMALL, "time_steps": 0, "weight_bits": 0}))
    assert not list(tmp_path.rglob("report.html"))


def test_what_cannot_be_converted_afterwards_is_refused_before(tmp_path):
    with pytest.raises(QsdError, match="verifies on validation images"):
        fit(tmp_path, [ConvertToSpikeDriven()], limit_val_batches=0)
    with pytest.raises(QsdError, match="raster='head' names no neuron"):
        fit(tmp_path, [ConvertToSpikeDriven(raster="head")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": -1}, "delay=-1 is negative"),
        ({"merge": False, "merged_bits": 4}, "merged_bits needs merged kernels"),
        ({"stages": ["all"]}, "stage 'all' is unknown"),
        ({"step_images": 0}, "step_images=0 is not positive"),
        ({"code": "ternary"}, "code='ternary' is unknown; use 'unary' or 'binary'"),
    ],
)
def test_wrong_options_are_named_at_once(options, message):
    with pytest.raises(QsdError, match=message):
        ConvertToSpikeDriven(**options)


@pytest.mark.usefixtures("undrawn")
def test_without_a_checkpoint_the_last_weights_are_saved_first(tmp_path):
    task = make_task()
    fit(tmp_path, [ConvertToSpikeDriven(**QUICK)], task, enable_checkpointing=False)
    saved = torch.load("final.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in task.state_dict().items())
    assert {file.name for file in tmp_path.iterdir()} == {"final.ckpt", *report.FILES}


def test_a_quick_trial_writes_nothing(tmp_path):
    fit(tmp_path, [ConvertToSpikeDriven(**QUICK)], fast_dev_run=True)
    assert not list(tmp_path.rglob("*.*"))


# -- two processes ----------------------------------------------------------------------------------------------------


@long
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="gloo is not built in")
@pytest.mark.parametrize("fails", sample([False], [False, True]))
def test_of_two_processes_the_first_converts_all_images_and_the_other_waits(fails, tmp_path):
    program = [ROOT / "tests/programs/convert_in_two.py", *(["fail"] if fails else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, program)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert (tmp_path / "best.ckpt").is_file()
    assert sorted(p.name for p in tmp_path.glob("rank*")) == ["rank0", "rank1"], done.stderr[-3000:]
    messages = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    if fails:
        assert done.returncode == 2
        assert all("the trained network is safe in" in message and "no room" in message for message in messages)
        assert not set(report.FILES) & {file.name for file in tmp_path.iterdir()}
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert messages == ["report there", "report there"]  # when either goes on
        record = json.loads((tmp_path / "conversion.json").read_text())
        assert record["accuracy"]["images"] == 200  # the whole validation part, not one process's half


# -- qsd convert ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a short training."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    fit(folder, [best(folder)])
    return folder / "best.ckpt"


@pytest.fixture
def convert():
    return convert_command.main


DATA = ["--data=DigitsData", "--data.img_size=16"]
FEW = ["--max-images=8", "--step-images=4"]


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_is_converted_with_a_table_of_delays(convert, checkpoint, capsys):
    options = ["--config", str(ROOT / "configs/digits.yaml"), "--data.img_size=16", "--part=test", "--delays", *FEW]
    assert convert([str(checkpoint), *options, "--leave-out", "audit", "energy"]) == 0
    out = capsys.readouterr().out
    assert "4 images stepped spike by spike" in out
    assert "report: converted/report.html" in out
    record = json.loads(Path("converted/conversion.json").read_text())
    assert record["data"]["description"] == "8 test images of DigitsData"
    assert record["left_out"] == ["audit", "energy"]
    for row in record["delays"]["rows"]:
        assert f"{row['latency']} steps" in out
    Image.new("L", (8, 8), 100).save("digit.png")
    assert run_command.main(["digit.png", "--model=converted/spiking.safetensors"]) == 0
    assert "Predictions" in capsys.readouterr().out
    Path("events.npy").write_bytes(b"no picture")
    assert run_command.main(["events.npy", "--model=converted/spiking.safetensors"]) == 2
    assert "name a network over frames with --model" in capsys.readouterr().err
    # and what it wrote, packed, can be converted again, otherwise
    again = ["converted/spiking.safetensors", *DATA, *FEW, "--out=again", "--merge=none", "--delay=0"]
    assert convert([*again, "--leave-out", *report.STAGES]) == 0
    other = json.loads(Path("again/conversion.json").read_text())
    assert other["conversion"] == {"merge": "none", "merged_bits": None, "delay": 0, "code": "unary"}
    assert other["model"]["name"] == record["model"]["name"] == "qsd_tiny"
    assert other["accuracy"]["quantized"] <= 1


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_is_converted_to_the_binary_code(convert, checkpoint):
    few = ["--max-images=4", "--step-images=2"]
    assert convert([str(checkpoint), *DATA, *few, "--code=binary"]) == 0
    assert qsd.load_packed("converted/spiking.safetensors").code.name == "binary"
    record = report.Record.read("converted/conversion.json")
    assert (record.conversion.code, record.delays, record.left_out) == ("binary", None, [])
    assert all(compared.equal_counts for compared in record.comparison if compared.dtype == "float64")
    assert [cost.code for cost in record.energy.codes] == ["unary", "binary"]
    page = Path("converted/report.html").read_text()
    assert "is its 2 binary digits" in page
    assert "with the delay ⌈log2(T + 1)⌉ − 1 = 1" in page
    assert "<td>binary (converted)</td>" in page


@pytest.mark.usefixtures("undrawn")
def test_a_network_that_was_compiled_is_converted_uncompiled(convert, checkpoint):
    @torch._dynamo.register_backend(name="refusing")
    def refusing(graph, inputs):
        raise AssertionError("compiled")

    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["compile"] = "refusing"
    torch.save(content, "compiled.ckpt")
    assert load_task("compiled.ckpt").model._compiled_call_impl is not None  # it would compile itself when called
    assert convert(["compiled.ckpt", *DATA, *FEW, "--leave-out", *report.STAGES]) == 0


@pytest.mark.usefixtures("undrawn")
def test_delays_are_calibrated_on_validation_images(convert, checkpoint, capsys):
    few = ["--max-images=2", "--step-images=2"]
    arguments = [str(checkpoint), *DATA, *few, "--calibrate=1.0", "--leave-out", *report.STAGES]
    assert convert(arguments) == 0
    record = json.loads(Path("converted/conversion.json").read_text())
    # every image may be lost, so no neuron need wait
    assert set(record["conversion"]["delay"].values()) == {0}
    assert record["latency"]["steps"] < 60
    assert "chosen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.ckpt", *DATA], "missing.ckpt does not exist"),
        (["bare.pt", *DATA], "bare.pt is no checkpoint of a training with qsd"),
        (["weights.safetensors", *DATA], "weights.safetensors"),
        (["CHECKPOINT"], "data"),
        (["CHECKPOINT", "--data=NoSuchData"], "NoSuchData"),
        (["CHECKPOINT", "--config=missing.yaml"], "missing.yaml"),
        (["CHECKPOINT", *DATA, "--out=there"], "there/report.html exists; pass --force"),
        (["CHECKPOINT", *DATA, "--merge=half"], "half"),
        (["CHECKPOINT", *DATA, "--merged-bits=1"], "argument --merged-bits: 1 is not from 2 to 16"),
        (["CHECKPOINT", *DATA, "--delays", "--leave-out", "delays"], "exclude each other"),
        (["CHECKPOINT", *DATA, "--delay=1", "--calibrate=0.1"], "exclude each other"),
        (["CHECKPOINT", *DATA, "--code=binary", "--calibrate=0.1"], "--calibrate is about early firing"),
        (["CHECKPOINT", *DATA, "--code=binary", "--delay=0"], "in the binary code the first digit of a count needs"),
        (["CHECKPOINT", *DATA, "--max-images=0"], "argument --max-images: 0 is below 1"),
        (["CHECKPOINT", *DATA, "--preset=gold"], "preset='gold' is unknown"),
        (["CHECKPOINT", "--data=DigitsData", "--data.in_chans=3"], "images have 3 channels"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes_give_one_line_and_leave_nothing(convert, checkpoint, capsys, arguments, message):
    torch.save({"conv.weight": torch.zeros(3)}, "bare.pt")
    Path("weights.safetensors").write_bytes(b"nothing")
    Path("there").mkdir()
    Path("there/report.html").write_text("precious")
    assert convert([str(checkpoint) if a == "CHECKPOINT" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("qsd: error: ")
    assert error.count("\n") == 1
    assert Path("there/report.html").read_text() == "precious"
    assert not list(Path().rglob("conversion.json"))
