"""The command line, in-process: every subcommand, layered configurations, odd images, and mistakes."""

import csv
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import qsd_launcher
from qsd import cli
from tests.helpers import ROOT

SMALL = "--model.model_args=" + json.dumps({"embed_dims": [8, 8, 8, 8], "num_heads": 2, "depth": 2})
QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.num_workers=0",
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def odd_tree(tree):
    """A small ImageNet layout with every kind of image that people have."""
    noise = np.random.RandomState(0).randint(0, 256, (40, 50, 4)).astype(np.uint8)
    folder = tree / "train" / "cat"
    Image.fromarray(noise[..., 0]).save(folder / "grey.png")
    Image.fromarray(noise[..., :3]).convert("P").save(folder / "palette.png")
    Image.fromarray(noise, "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(noise, "RGBA").save(folder / "alpha.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(noise[..., :2], "LA").save(tree / "val" / "dog" / "grey_alpha.png")
    return tree


def imagenet(tree, *more):
    return [
        "--config", str(ROOT / "configs" / "imagenet.yaml"), "--data.root", str(tree), "--data.img_size=32", SMALL,
        "--trainer.precision=32", *QUICK, *more,
    ]  # fmt: skip


def test_imagenet_config_trains_evaluates_and_predicts_on_any_tree(odd_tree, capsys):
    # 17 images, fewer than the batch of 196; two classes, counted
    assert cli.main(["fit", *imagenet(odd_tree, "--trainer.max_epochs=1")]) == 0
    run = Path("runs/imagenet/version_0")
    assert {p.name for p in run.iterdir()} >= {"checkpoints", "config.yaml", "hparams.yaml", "metrics.csv"}
    assert list(run.glob("events*"))
    assert yaml.safe_load((run / "hparams.yaml").read_text())["num_classes"] == 2
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert any(row["val/accuracy"] for row in rows)
    best = str(run / "checkpoints" / "best.ckpt")

    # The model comes from the checkpoint; only the data has to be named.
    data = ["--data=ImageFolderData", f"--data.root={odd_tree}", "--data.img_size=32", *QUICK]
    assert cli.main(["validate", *data, "--ckpt_path", best]) == 0
    assert cli.main(["test", *data, "--ckpt_path", best]) == 0
    assert "test/accuracy" in capsys.readouterr().out
    assert cli.main(["predict", *data, "--ckpt_path", best, f"--data.predict_path={odd_tree / 'train'}"]) == 0
    (table,) = Path("runs").rglob("predictions.csv")
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 16
    assert {row["class"] for row in rows} <= {"cat", "dog"}
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)
    assert not list(Path("runs").rglob("*.part"))


def test_overlays_layer_and_the_printed_configuration_is_complete(tree, capsys):
    overlays = [x for name in ("imagenet_31m", "imagenet_w3") for x in ("--config", str(ROOT / f"configs/{name}.yaml"))]
    assert cli.main(["fit", "--config", str(ROOT / "configs/imagenet.yaml"), *overlays, "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["model"] == "qsd_31m"
    assert config["model"]["init_args"]["model_args"]["weight_bits"] == 3
    assert config["model"]["init_args"]["base_lr"] == 6e-4
    assert config["data"]["init_args"]["batch_size"] == 196


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=2"],
        ["--model.grad_checkpointing=true", "--model.mixup=0.5", "--model.cutmix=1.0", "--model.lean=true"],
        ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.init_args.decay=0.9"],
    ],
    ids=["bf16 accumulated", "lean with mixup", "averaged"],
)
def test_training_options(tree, options):
    # 11 images: an odd batch of 3 at the end, which Mixup cannot pair up
    assert cli.main(["fit", *imagenet(tree, "--data.batch_size=4", "--trainer.max_epochs=1", *options)]) == 0
    checkpoint = torch.load("runs/imagenet/version_0/checkpoints/last.ckpt", weights_only=True)
    assert ("current_model_state" in checkpoint) == ("EMAWeightAveraging" in str(options))
    assert checkpoint["hyper_parameters"]["lean"] == ("--model.lean=true" in options or "auto")


def test_a_run_goes_on_where_it_stopped(tree):
    assert cli.main(["fit", *imagenet(tree, "--trainer.max_epochs=1")]) == 0
    last = "runs/imagenet/version_0/checkpoints/last.ckpt"
    assert cli.main(["fit", *imagenet(tree, "--trainer.max_epochs=2", "--ckpt_path", last)]) == 0
    assert torch.load("runs/imagenet/version_1/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1


def test_two_runs_give_the_same_weights(tree):
    for _ in range(2):
        assert cli.main(["fit", *imagenet(tree, "--trainer.max_epochs=1", "--data.batch_size=4")]) == 0
    a, b = (
        torch.load(f"runs/imagenet/version_{i}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for i in (0, 1)
    )
    assert all(torch.equal(v, b[k]) for k, v in a.items())


# -- mistakes: one line, exit code 2, nothing left behind -------------------------------------------------------------


def fails(capsys, *args):
    code = cli.main(list(args))
    error = capsys.readouterr().err
    log = ("INFO", "WARNING", "Seed set", "GPU available", "TPU available", "💡", "Loading", "Restoring", "Loaded")
    lines = [line for line in error.splitlines() if line.strip() and not line.startswith(log) and "Warning" not in line]
    lines = [line for line in lines if not line.startswith("  ")]  # the code that a warning quotes
    assert code == 2
    assert len(lines) == 1, error
    assert lines[0].startswith("qsd: error: ")
    assert not list(Path().rglob("*.ckpt"))
    return lines[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model.model=qsd_15"], "model 'qsd_15' is unknown to timm; nearest names: qsd_15m"),
        (["--model.num_classes=1"], "the data has 2 classes"),
        (["--data.root=nowhere"], "nowhere"),
        (["--data.img_size=8"], "smaller than the network's total stride 16"),
        (['--model.model_args={"embed_dims": [8, 8, 9, 8], "num_heads": 2}'], r"embed_dims[2]=9 is not divisible"),
        (["--model.init_from=nothing.pth"], "checkpoint nothing.pth does not exist"),
        (["--ckpt_path=nothing.ckpt"], "nothing.ckpt"),
        (["--trainer.max_epochs=-1"], "set --trainer.max_epochs"),
        (["--trainer.accelerator=abacus"], "abacus"),
        (["--model.optimizer=abacus"], "optimizer 'abacus'"),
        (["--model.model_args={'foo': 1}"], "'foo'"),
        (["--model.label_smoothing=2"], "label_smoothing=2"),
        (["--model.compile=abacus"], "abacus"),
        (["--data.img_size=abc"], "img_size"),
        (["--data.batch_size=2.5"], "batch_size"),
        (["--trainer.callbacks+=Abacus"], "Abacus"),
        (["--trainer.no_such=3"], "no_such"),
        (["--config=missing.yaml"], "missing.yaml"),
        (["--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches=0"),
        (["--data.std=[0,0,0]"], "std=(0.0, 0.0, 0.0)"),
        (["--data.img_size=16", "--data.batch_size=1"], "raise batch_size or img_size"),
        (["--ckpt_path=best"], "ckpt_path='best' names no file"),
        (["--model.base_lr=1e30"], "training stopped, no checkpoint was written yet"),
    ],
    ids=lambda value: value[0][2:30] if isinstance(value, list) else "",
)
def test_mistakes_give_one_line(tree, capsys, change, message):
    assert message in fails(capsys, "fit", *imagenet(tree, "--trainer.max_epochs=40", *change))


def test_a_folder_without_images_a_wrong_layout_and_a_truncated_file_are_named(tree, truncated, capsys, tmp_path):
    (tree / "train" / "empty").mkdir()
    assert "empty" in fails(capsys, "fit", *imagenet(tree))
    (tree / "train" / "empty").rmdir()
    assert "train" in fails(capsys, "fit", *imagenet(tree / "train"))
    bad = truncated(tree / "train" / "cat" / "bad.jpg")
    assert str(bad) in fails(capsys, "fit", *imagenet(tree, "--trainer.max_epochs=1"))
    assert cli.main(["fit", *imagenet(tree, "--trainer.max_epochs=1", "--data.on_bad_image=skip")]) == 0


def test_a_checkpoint_of_another_size_is_refused(tree, capsys):
    assert cli.main(["fit", *imagenet(tree, "--trainer.max_epochs=1")]) == 0
    Path("runs/imagenet/version_0/checkpoints/best.ckpt").rename("best.pt")
    for file in Path().rglob("*.ckpt"):
        file.unlink()
    other = SMALL.replace("[8, 8, 8, 8]", "[8, 8, 16, 8]")
    message = fails(capsys, "fit", *imagenet(tree, other, "--model.init_from=best.pt"))
    assert "best.pt does not fit the model" in message
    assert len(message) < 600


@pytest.mark.parametrize("kind", ["garbage", "empty", "truncated", "list", "state dict", "folder", "safetensors"])
def test_a_ckpt_path_that_is_no_checkpoint_is_named(kind, tree, capsys):
    state = {"a": torch.zeros(3)}
    path = Path("file.safetensors" if kind == "safetensors" else "file")
    if kind == "folder":
        path.mkdir()
    elif kind in ("list", "state dict"):
        torch.save([1, 2] if kind == "list" else state, path)
    elif kind == "safetensors":
        save_file(state, path)
    elif kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:200])
    else:
        path.write_bytes(b"" if kind == "empty" else b"no checkpoint")
    for command in ("fit", "validate"):
        assert str(path) in fails(capsys, command, *imagenet(tree, f"--ckpt_path={path}"))


def test_a_checkpoint_s_network_is_taken_and_every_other_setting_is_the_user_s(tree, capsys):
    assert cli.main(["fit", *imagenet(tree, "--trainer.max_epochs=1")]) == 0
    path = Path("runs/imagenet/version_0/checkpoints/last.ckpt")
    other = ["--model.model_args={}", "--model.base_lr=0.5", "--trainer.max_epochs=2", f"--ckpt_path={path}"]
    assert cli.main(["fit", *imagenet(tree, *other)]) == 0
    saved = torch.load("runs/imagenet/version_1/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["base_lr"] == 0.5
    assert saved["model_args"]["embed_dims"] == [8, 8, 8, 8]
    broken = torch.load(path, weights_only=True)
    del broken["hyper_parameters"]  # such as another tool's: the command line then has to know the network
    torch.save(broken, "bare")
    for file in Path().rglob("*.ckpt"):
        file.unlink()
    message = fails(capsys, "validate", *imagenet(tree, "--model.model_args={}", "--ckpt_path=bare"))
    assert "the checkpoint does not fit the model" in message


def test_evaluating_random_weights_is_refused(tree, capsys):
    for command in ("validate", "test", "predict"):
        assert f"{command} needs trained weights" in fails(capsys, command, *imagenet(tree))


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    assert "predict" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qsd ")


def test_the_traceback_is_there_for_those_who_ask(tree):
    with pytest.raises(ValueError, match="unknown to timm"):
        cli.main(["fit", *imagenet(tree, "--model.model=qsd_15"), "--traceback"])


def test_the_documented_command_trains_from_a_folder_without_configurations(tree, monkeypatch):
    # `lightning fit --config configs/imagenet.yaml`
    arguments = ["--config", "configs/imagenet.yaml", *imagenet(tree, "--trainer.max_epochs=1")[2:]]
    monkeypatch.setattr(sys, "argv", ["lightning", "fit", *arguments])
    monkeypatch.setattr(qsd_launcher, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        qsd_launcher.run_lightning()
    assert ended.value.code == 0
    assert Path("runs/imagenet/version_0/checkpoints/best.ckpt").is_file()


@pytest.mark.parametrize(("callback", "code"), [("PressCtrlC", 130), ("Terminate", 143)])
def test_a_training_that_is_stopped_says_so_by_its_exit_code(tree, callback, code):
    stop = f"--trainer.callbacks+=tests.helpers.training.{callback}"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["fit", *imagenet(tree, "--trainer.max_epochs=2", stop)]) == code
    finally:
        signal.signal(signal.SIGINT, handlers[0])  # Lightning ignores it from here on
        signal.signal(signal.SIGTERM, handlers[1])


@pytest.mark.parametrize(
    ("options", "nearest"),
    [
        (["--trainer.max_epoxs=3"], "--trainer.max_epochs"),
        (["--modle=ClassificationTask"], "--model"),
        (["--data.img_sise=3"], "--data.img_size"),
        (["--model.base_rl=3"], "--model.base_lr"),
        (["--config=configs/imagnet.yaml"], "configs/imagenet.yaml"),
    ],
)
def test_a_mistyped_option_is_told_the_nearest_one(tree, capsys, options, nearest):
    assert f"did you mean {nearest}?" in fails(capsys, "fit", *imagenet(tree, *options))


@pytest.mark.parametrize(("arguments", "theirs"), [(["login"], True), (["fit", "--help"], False), ([], False)])
def test_lightning_passes_on_what_is_not_ours_to_lightning_sdk(monkeypatch, arguments, theirs):
    called = []

    class Entrypoint:
        main_cli = staticmethod(lambda: called.append("sdk"))

    monkeypatch.setattr(qsd_launcher, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "lightning_sdk", Entrypoint)
    monkeypatch.setitem(sys.modules, "lightning_sdk.cli", Entrypoint)
    monkeypatch.setitem(sys.modules, "lightning_sdk.cli.entrypoint", Entrypoint)
    monkeypatch.setattr(qsd_launcher, "run", lambda: called.append("qsd"))
    monkeypatch.setattr(sys, "argv", ["lightning", *arguments])
    if theirs:
        with pytest.raises(SystemExit):  # with the exit code that theirs returns
            qsd_launcher.run_lightning()
    else:
        qsd_launcher.run_lightning()
    assert called == ["sdk" if theirs else "qsd"]
