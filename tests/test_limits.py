"""Numbers from the command line that used to fail deep inside: one line, before anything is loaded."""

import pytest

from qsd import QsdError
from qsd.callbacks import Distillation, SpikeStatistics
from qsd.data import DigitsData, ImageFolderData
from qsd.limits import check_trainer
from qsd.program import parser_message
from qsd.tasks import ClassificationTask
from qsd_launcher import main
from tests.helpers import sample

TRAINER = [
    ({"max_epochs": -2}, "trainer.max_epochs=-2 is below -1"),
    ({"gradient_clip_val": float("inf")}, "trainer.gradient_clip_val=inf is not finite"),
    ({"check_val_every_n_epoch": 0}, "trainer.check_val_every_n_epoch=0 is below 1"),
    ({"val_check_interval": 0}, "trainer.val_check_interval=0 is not positive"),
    ({"val_check_interval": float("nan")}, "trainer.val_check_interval=nan is not finite"),
    ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches=0 is below 1"),
    ({"limit_train_batches": float("inf")}, "trainer.limit_train_batches=inf is not finite"),
    ({"log_every_n_steps": -1}, "trainer.log_every_n_steps=-1 is negative"),
    ({"devices": 1000000}, "trainer.devices=1000000 is not from 1 to"),
    ({"accelerator": "cpu", "devices": "1000000"}, "trainer.devices=1000000 is not from 1 to"),
]
# Each builds the parsers of Lightning, which takes a second.
COMMANDS = sample(
    ["fit --trainer.val_check_interval 0", "convert a.ckpt --device gpu"],
    [
        "fit --seed_everything 4294967296", "fit --seed_everything -1", "fit --trainer.max_epochs -2",
        "fit --trainer.gradient_clip_val .inf", "fit --trainer.check_val_every_n_epoch 0",
        "fit --trainer.val_check_interval 0", "fit --trainer.accelerator gpuu", "fit --model.base_lr .inf",
        "convert a.ckpt --max-images 0", "convert a.ckpt --delay -1", "convert a.ckpt --delay 99999",
        "convert a.ckpt --calibrate inf", "convert a.ckpt --float-accuracy nan", "convert a.ckpt --merged-bits 99",
        "convert a.ckpt --device gpu", "convert a.ckpt --device cuda:99", "convert a.ckpt --device meta",
        "export a.ckpt --max-images -3", "analyze a.ckpt --max-images 0", "analyze a.ckpt --device tpu",
    ],
)  # fmt: skip
WORDS = {
    "4294967296": "is not from 0 to 4294967295", "-1": "negative", "-2": "-2 is below -1", ".inf": "inf is not finite",
    "gpuu": "gpuu", "99999": "not from 0 to 4096", "inf": "inf is not finite", "nan": "nan is not finite",
    "99": "not from 2 to 16", "gpu": "the device 'gpu' is unknown", "cuda:99": "the device 'cuda:99' does not exist",
    "meta": "the device 'meta' is not supported", "tpu": "the device 'tpu' is unknown", "-3": "-3 is below 1",
}  # fmt: skip
NEAREST = sample(
    [("fit --model.modle qsd_8m", "--model.model")],
    [
        ("fit --model.modle qsd_8m", "--model.model"), ("fit --data.batch_sise 8", "--data.batch_size"),
        ("fit --trainer.maxepochs 1", "--trainer.max_epochs"), ("convert a.ckpt --max-imagse 3", "--max-images"),
    ],
)  # fmt: skip
QUICK = [
    ("run a.png --model a.onnx --top 0", "0 is below 1"),
    ("run a.png --model a.onnx --top 1e3", "'1e3' is no whole number"),
    ("run a.png --model a.onnx --score inf", "inf is not finite"),
    ("run a.png --model a.onnx --device abc", "the device 'abc' is unknown"),
    ("profile qsd_tiny --img-size -224", "-224 is below 1"),
    ("profile qsd_tiny --epoch-images 0", "0 is below 1"),
    ("profile qsd_tiny --model-args [1]", "is no JSON object"),
    ("profile qsd_tiny --model-args {", "is no JSON"),
    ("benchmark training --batch-size 0", "0 is below 1"),
    ("benchmark training --time-steps 256", "256 is not from 1 to 255"),
    ("benchmark training --device nowhere", "the device 'nowhere' is unknown"),
    ("benchmark training --roundz 3", "did you mean --rounds?"),
    ("import-checkpoint a.pth b.ckpt --num-heads 0", "0 is below 1"),
    ("import-checkpoint a.pth b.ckpt --weight-bits 9", "9 is not from 0 to 8"),
    ("demo digits --max-images 0", "0 is below 1"),
    ("demo scenes folder --scenes 0 1 1", "0 is below 1"),
    ("demo scenes folder --seed -1", "-1 is negative"),
]  # fmt: skip


def refused(command, capsys):
    """The line by which a command is refused."""
    words = command.split()
    if words[0] == "fit":
        words[1:1] = ["--config", "configs/digits.yaml", "--trainer.logger", "false"]  # what follows has precedence
    assert main(words) == 2, command
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert len(error) < 700, command
    return error


def test_numbers_that_cannot_be_end_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        value = command.split()[-1]
        expected = (
            "val_check_interval=0" if "val_check_interval" in command else WORDS.get(value, f"{value} is below 1")
        )
        expected = "check_val_every_n_epoch=0" if "check_val_every" in command else expected
        assert expected in refused(command, capsys), command
    for command, message in QUICK:
        assert message in refused(command, capsys), command
    assert not list(tmp_path.iterdir())


def test_a_mistyped_option_is_named_with_the_nearest_one(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command, nearest in NEAREST:
        assert f"did you mean {nearest}?" in refused(command, capsys), command


def test_numbers_of_the_trainer_are_checked():
    for settings, message in TRAINER:
        with pytest.raises(QsdError, match=message):
            check_trainer(settings, True)
    for seed in (-1, 2**32):
        with pytest.raises(QsdError, match="seed_everything="):
            check_trainer({}, seed)
    check_trainer({"max_epochs": -1, "val_check_interval": 0.25, "gradient_clip_val": None}, False)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ClassificationTask("qsd_tiny", base_lr=float("inf")), "base_lr=inf is not finite"),
        (lambda: ClassificationTask("qsd_tiny", base_lr=float("nan")), "base_lr=nan is not finite"),
        (lambda: ClassificationTask("qsd_tiny", min_lr=-1), "min_lr=-1 is negative"),
        (lambda: ClassificationTask("qsd_tiny", step_lr=float("inf")), "step_lr=inf is not finite"),
        (lambda: ClassificationTask("qsd_tiny", warmup_epochs=float("inf")), "warmup_epochs=inf is not finite"),
        (lambda: ClassificationTask("qsd_tiny", weight_decay=float("inf")), "weight_decay=inf is not finite"),
        (lambda: ClassificationTask("qsd_tiny", layer_decay=2.0), "layer_decay=2.0 is not from 0 to 1"),
        (lambda: ClassificationTask("qsd_tiny", mixup=float("inf")), "mixup=inf is not finite"),
        (lambda: ClassificationTask("qsd_tiny", label_smoothing=float("nan")), "label_smoothing=nan"),
        (lambda: DigitsData(seed=2**32), "seed=4294967296 is not from 0"),
        (lambda: ImageFolderData("x", std=(1.0, float("inf"), 1.0)), "std=inf is not finite"),
        (lambda: ImageFolderData("x", scale=(0.1, float("inf"))), "scale=inf is not finite"),
        (lambda: SpikeStatistics(batches=0), "batches=0 is below 1"),
        (lambda: Distillation("qsd_tiny_ann", logits_weight=float("inf")), "logits_weight=inf is not finite"),
    ],
)
def test_arguments_of_constructors_are_checked(build, message):
    with pytest.raises(QsdError, match=message):
        build()


def test_the_nearest_option_is_named():
    assert parser_message("unrecognized arguments: --max-imagse", ["--max-images"]).endswith("mean --max-images?")


def test_evaluation_in_mixed_precision_is_told_once():
    from types import SimpleNamespace

    from qsd.tasks.guards import PrecisionNote

    note, task = PrecisionNote(), ClassificationTask("qsd_tiny")
    note.on_validation_start(SimpleNamespace(precision="32-true"), task)
    with pytest.warns(UserWarning, match="autocast computes membrane potentials in bfloat16"):
        note.on_validation_start(SimpleNamespace(precision="bf16-mixed"), task)
    note.on_test_start(SimpleNamespace(precision="bf16-mixed"), task)
