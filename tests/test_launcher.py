"""The launcher beside the package: the answers that need no PyTorch, and the way to all others."""

import subprocess
import sys

import pytest

import qsd
import qsd_launcher
from tests.helpers import ROOT

QUICK = """
import sys, time
import qsd_launcher
code = qsd_launcher.main(sys.argv[1:])
assert "torch" not in sys.modules and "qsd" not in sys.modules
assert time.process_time() < 0.5
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [(["--version"], 0, f"qsd {qsd.__version__}"), (["--help"], 0, "import-checkpoint"), (["fitt"], 2, "mean fit?")],
)
def test_version_help_and_a_mistyped_subcommand_import_no_torch(arguments, code, says):
    command = [sys.executable, "-c", QUICK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr


def test_the_package_as_a_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "qsd", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout == f"qsd {qsd.__version__}\n"


@pytest.mark.parametrize("name", qsd_launcher.SUBCOMMANDS)
def test_every_subcommand_has_a_readable_help(name, capsys):
    assert qsd_launcher.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: qsd {'' if name in qsd_launcher.TRAINING else name}")
    assert "--traceback" in out or name in qsd_launcher.TRAINING
    assert "==SUPPRESS==" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no subcommand is given; choose one of fit, validate"),
        (["convrt"], "the subcommand 'convrt' is unknown; did you mean convert?"),
        (["abacus"], "the subcommand 'abacus' is unknown; choose one of fit, validate"),
        (["--vresion"], "did you mean --version?"),
        (["run", "image.png", "--modle=x"], "did you mean --model?"),
        (["convert", "x.ckpt", "--forze"], "did you mean --force?"),
        (["convert", "x.ckpt", "--config=configs/digit.yaml"], "did you mean configs/digits.yaml?"),
        (["convert", "x.pth", "--delays"], "--delays is for classifiers"),
        (["convert", "x.ckpt", "--data=DigitsData", "--cfg-options", "a=1"], "--cfg-options is for"),
        (["export", "x.pth", "--config=configs/digits.yaml"], "qsd convert writes the packed file of a detector"),
        (["run", "image.png", "--model=x.pth"], "name the folder of the pictures with --out DIR"),
        (["run", "image.png", "--model=x.onnx", "--out=there"], "--out is for detectors and segmenters"),
        (["demo", "abacus"], "abacus"),
        (["benchmark", "infernce"], "suite 'infernce' is unknown; choose from inference"),
        (["convert", "x.ckpt", "--data=DigitsData", "--data.img_sise=3"], "did you mean --data.img_size?"),
        (["convert", "x.pth"], "checkpoint x.pth does not exist"),
    ],
    ids=" ".join,
)
def test_mistakes_give_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert qsd_launcher.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("qsd: error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_traceback_is_printed_for_those_who_ask_and_the_exit_code_is_the_same(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qsd", "profile", "qsd_15", "--traceback"])
    with pytest.raises(SystemExit) as ended:
        qsd_launcher.run()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert "unknown to timm" in error


@pytest.mark.parametrize("name", ["convert", "mm_convert", "export", "predict", "profile_model", "benchmark", "demo"])
def test_scripts_that_have_moved_say_where_and_run_the_command(name, tool, capsys):
    assert tool(name).main(["--help"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("This script has moved: use qsd ")
    assert captured.out.startswith("usage: qsd ")


def test_options_of_scripts_that_have_moved_keep_their_old_names(tool, capsys):
    assert tool("profile_model").main(["qsd_tiny", "--image-size=8"]) == 2
    assert "8x8 pixels are smaller" in capsys.readouterr().err
    assert tool("mm_predict").main(["image.png", "--checkpoint", "missing.pth", "--out", "there"]) == 2
    assert "missing.pth does not exist" in capsys.readouterr().err
