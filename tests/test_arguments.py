"""Wrong values and names of options and of configurations: one line that names the option as it is typed."""

import os
from pathlib import Path

import pytest

from qsd import QsdError
from qsd.arguments import argument_message
from qsd.configurations import read_configuration, with_found_configurations
from qsd_launcher import main

CALLBACK = "--trainer.callbacks+=ConvertToSpikeDriven"
MISTAKES = [
    (["--model.base_lr=abc"], "--model.base_lr=abc does not fit; give a number."),
    (["--model.model_args={a"], "--model.model_args={a does not fit; give pairs such as {name: 1} or null."),
    (["--model.compile=[1]"], "--model.compile=[1] does not fit; give true, false or a text."),
    (["--model=foo"], "--model=foo names no class."),
    (["--data.batch_size="], "--data.batch_size= does not fit; give a whole number."),
    (["--data.img_size=nan"], "--data.img_size=nan does not fit; give a whole number or a list in brackets."),
    (["--data.scale=3"], "unrecognized arguments: --data.scale"),  # digits are not cropped
    (["--data=TorchvisionData", "--data.name=mnist"], "--data.root is missing."),
    (
        ["--data=TorchvisionData", "--data.root=x", "--data.name=foo"],
        "--data.name=foo does not fit; give 'mnist', 'fashion_mnist', 'kmnist', ",
    ),
    (["--data=DigitData"], "--data=DigitData names no class; did you mean DigitsData?"),
    (["--data=torch.nn.Linear"], "--data names a class that is no LightningDataModule."),
    (["--trainer.max_epochs=abc"], "--trainer.max_epochs=abc does not fit; give a whole number or null."),
    (["--trainer.precision=foo"], "--trainer.precision=foo does not fit; give 64, 32, 16, 'transformer-engine', "),
    (["--trainer.logger=NoLogger"], "--trainer.logger=NoLogger names no class."),
    (["--trainer=5"], "--trainer=5 is no file of settings."),
    ([CALLBACK, "--trainer.callbacks.step_images=a"], "--trainer.callbacks.step_images=a does not fit; give a"),
    ([CALLBACK, "--trainer.callbacks.stagez=a"], "unrecognized arguments: --trainer.callbacks.stagez; did you mean "
     "--trainer.callbacks.stages?"),
    ([CALLBACK[:-3]], "names no class; did you mean ConvertToSpikeDriven?"),
    (["--data=foo.Bar"], "--data=foo.Bar cannot be used: No module named 'foo'."),
    (["--data=qsd.data.DigitData"], "module 'qsd.data' has no attribute 'DigitData'; did you mean DigitsData?"),
]  # fmt: skip
FILES = [
    ("data: {class_path: DigitsData, init_args: {batch_size: abc}}", "--data.batch_size=abc does not fit; give a"),
    ("data: {class_path: DigitsData, init_args: {batch_sise: 3}}", ".batch_sise; did you mean --data.batch_size?"),
    ("modle: {class_path: ClassificationTask}", "unrecognized arguments: --modle.class_path; did you mean --model?"),
    ("trainer: {max_epoch: 3}", "unrecognized arguments: --trainer.max_epoch; did you mean --trainer.max_epochs?"),
    (
        "trainer: {callbacks: [{class_path: ConvertToSpikeDriven, init_args: {step_images: abc}}]}",
        "--trainer.callbacks.step_images=abc does not fit; give a whole number.",
    ),
    ("trainer: {callbacks: [{class_path: SpikeStatistic}]}", "names no class; did you mean SpikeStatistics?"),
    ("", "configuration own.yaml has no sections, such as model: and data:"),
    ("- 1", "configuration own.yaml has no sections"),
    ("a: [1", 'configuration own.yaml is no YAML: while parsing a flow sequence in "own.yaml", line 1, column 4'),
    ("trainer: {max_epochs: 1}\ntrainer: {devices: 1}", "names 'trainer' twice, again in line 2; join them."),
    ("trainer:\n  logger: [{init_args: {name: a, name: b}}]", "names 'name' twice, again in line 2; join them."),
]


def refused(capsys, *words):
    assert main([*words]) == 2, words
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    return error


def test_wrong_options_are_told_with_their_value_and_what_fits(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options, message in MISTAKES:
        assert message in refused(capsys, "fit", "--config", "configs/digits.yaml", *options), options
    assert not list(tmp_path.iterdir())


def test_wrong_entries_of_a_configuration_are_told_alike(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, message in FILES:
        (tmp_path / "own.yaml").write_text(text)
        assert message in refused(capsys, "fit", "--config", "configs/digits.yaml", "--config", "own.yaml"), text


def test_references_in_a_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    levels = [f"l{n}: &l{n} [*l{n - 1}, *l{n - 1}, *l{n - 1}]" for n in range(1, 60)]
    for text, message in (
        ("a: &a {b: [*a]}", "configuration own.yaml has a section that holds itself, in line 1."),
        ("\n".join(["l0: &l0 [a]", *levels]), "stands for more than 1000000 entries"),  # 3^60
    ):
        Path("own.yaml").write_text(text)
        with pytest.raises(QsdError, match=message):
            read_configuration(Path("own.yaml"))
    Path("own.yaml").write_text("\n".join(["l0: &l0 [a]", *levels[:5]]))
    assert read_configuration(Path("own.yaml")) == Path("own.yaml").read_text()


def test_a_configuration_may_come_from_a_pipe(tmp_path):
    read, write = os.pipe()
    os.write(write, b"data: {init_args: {batch_size: 3}}")
    os.close(write)
    try:
        assert with_found_configurations(["--config", f"/dev/fd/{read}"]) == ["--config", f"/dev/fd/{read}"]
        assert os.read(read, 100)  # nothing was taken from it
    finally:
        os.close(read)


def test_what_every_training_needs_is_asked_for(capsys):
    assert "--data is missing; give it, or --config FILE." in refused(capsys, "fit", "--model.model", "qsd_tiny")


def test_commands_that_read_images_tell_them_alike(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for option, message in (
        ("--data.batch_size=abc", "--data.batch_size=abc does not fit; give a whole number."),
        ("--data.batch_sise=3", "did you mean --data.batch_size?"),
        ("--data=DigitData", "--data=DigitData names no class; did you mean DigitsData?"),
    ):
        assert message in refused(capsys, "convert", "x.ckpt", "--config", "configs/digits.yaml", option)


@pytest.mark.parametrize("message", ["something else", 'Parser key "x": something else', "key \"x\": <class 'a.B'>"])
def test_a_message_of_another_form_is_kept(message):
    assert argument_message(message, [], {}) == message
