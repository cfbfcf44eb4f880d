"""The README is true: each of its commands runs, shortened and in-process where it is long."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import qsd
from qsd import cli
from qsd.data import ImageArray
from qsd.export import to_onnx
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
SIZES = {"embed_dims": [8, 8, 8, 8], "num_heads": 2, "depth": 2}
CSD_SIZES = {"embed_dims": 8, "num_heads": 2, "depth": 1}
SHORT = [
    "--model.model_args=" + json.dumps(SIZES), "--data.img_size=32", "--data.num_workers=0", "--data.batch_size=8",
    "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=2",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip
SHORT_CSD = ["--model.model_args=" + json.dumps(CSD_SIZES), *SHORT[1:]]
EVALUATE = [option for option in SHORT if "max_epochs" not in option and "limit_train" not in option]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Train a configuration, once; gives the folder that its runs lie in."""
    folders = {}

    def train(name, short):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folders[name])
                assert cli.main(["fit", "--config", str(ROOT / f"configs/{name}.yaml"), *short]) == 0
        return folders[name] / "runs" / name

    return train


@pytest.fixture
def workplace(tmp_path, tree, reference_state, monkeypatch):
    """A folder as the README's reader has it: configurations, data, a reference checkpoint."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    torch.save({"model": reference_state}, tmp_path / "REFERENCE.pth")
    return tmp_path


def bring_run(command, finished):
    """The training whose checkpoint the command names."""
    for name, short in (("digits", SHORT), ("csdformer_digits", SHORT_CSD)):
        if f"runs/{name}/" in command:
            shutil.copytree(finished(name, short), f"runs/{name}")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("qsd ")])
def test_qsd_commands(command, workplace, tree, tool, finished, monkeypatch):
    bring_run(command, finished)
    if "cifar" in command:
        monkeypatch.setattr("qsd.data.CifarData.load_part", _noise)
        torch.save(timm.create_model("qsd_15m", num_classes=5, **SIZES).state_dict(), "CHECKPOINT")
        command = command.replace("--data.download true", "")  # no network in a test
    if "teacher CHECKPOINT" in command:
        _save_teacher("CHECKPOINT", *((3, 2) if "DIR" in command else (1, 10)))
    if "imported.ckpt" in command:
        assert tool("import_checkpoint").main(["REFERENCE.pth", "imported.ckpt", "--num-heads=4"]) == 0
    words = [str(tree) if word == "DIR" else word for word in shlex.split(command)[1:]]
    short = SHORT_CSD if "csdformer" in command else SHORT
    short = [*short, "--trainer.precision=32"] if words[0] == "fit" else EVALUATE
    if "ckpt_path" in command:  # the model comes from the checkpoint
        short = [option for option in short if "model_args" not in option]
    if "--trainer.devices" in words:  # as another process starts it, it is tested with the distributed tests
        words = words[: words.index("--trainer.devices")]
    words = [
        word.replace("true", "eager") if words[i - 1] == "--model.compile" else word for i, word in enumerate(words)
    ]
    if "--print_config" in words:
        short = []
    assert cli.main([*words, *short]) == 0
    if words[0] == "predict":
        assert len(list(workplace.rglob("predictions.csv"))) == 1


def _save_teacher(path, in_chans, num_classes):
    """What a training of the float twin leaves, as far as it is read."""
    sizes = {**SIZES, "in_chans": in_chans}
    twin = timm.create_model("qsd_tiny_ann", num_classes=num_classes, **sizes)
    hyper_parameters = {"model": "qsd_tiny_ann", "model_args": sizes, "num_classes": num_classes}
    torch.save({"state_dict": twin.state_dict(), "hyper_parameters": hyper_parameters}, path)


def _noise(self, part):
    """In place of CIFAR's files."""
    images = np.random.RandomState(0).randint(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    return ImageArray(images, [0, 1] * 4, [f"{part} {i}" for i in range(8)])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_commands(command):
    done = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    scripts = {"make demo": "qsd demo", "make test": "pytest"}
    scripts |= {f"make demo-{kind}": f"qsd demo {kind}" for kind in ("detection", "segmentation")}
    assert scripts[command] in done.stdout


# What shortens each tool, and what it must say. Those of mmdet and mmseg are run by tests/mm/test_readme.py, the
# ablation by tests/test_distillation_tools.py.
TOOLS = {
    "import_checkpoint": (["--num-heads=4"], "imported.ckpt: "),
    "convert": (["--max-images=4", "--step-images=2", "--data.img_size=32"], "report: "),
    "compare_activations": (["--", *SHORT_CSD], "qcfs"),
    "export": (["--images=8", "--data.img_size=32"], "digits.onnx: "),
    "predict": ([], "Predictions"),
    "profile_model": ([], "18.512 G"),
    "distill": ([*SHORT, "--trainer.limit_test_batches=1"], "_distill.yaml"),
    "analyze_attention": (["--max-images=4", "--data.img_size=32"], "page: "),
    "benchmark": (["--quick", "--rounds=1", "--img-size=32", "--no-memory"], "benchmark.json"),
}


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("python ") and Path(c.split()[1]).stem in TOOLS]
)
def test_tools(command, workplace, tree, finished, tool, capsys):
    bring_run(command, finished)
    assert tool("import_checkpoint").main(["REFERENCE.pth", "CHECKPOINT", "--num-heads=4"]) == 0
    if "BEFORE" in command:
        trained = finished("digits", SHORT) / "version_0/checkpoints/best.ckpt"
        for name in ("BEFORE", "AFTER", "TEACHER"):
            shutil.copy(trained, name)
    if "predict" in command:
        _export_a_network()
    script, *arguments = (str(tree) if word == "DIR" else word for word in shlex.split(command)[1:])
    short, says = TOOLS[Path(script).stem]
    assert tool(Path(script).stem).main([*arguments, *short]) == 0
    assert says in capsys.readouterr().out


def _export_a_network():
    """What the command before it writes, and an image."""
    spiking = qsd.to_spike_driven(timm.create_model("qsd_tiny", num_classes=3, **SIZES).eval())
    notes = {"class_names": ["cat", "dog", "cow"], "mean": [0.5] * 3, "std": [0.2] * 3}
    to_onnx(spiking, "digits.onnx", notes=notes)
    Image.new("RGB", (40, 30), (200, 100, 0)).save("IMAGE", "PNG")


def test_no_command_is_left_out():
    assert len(COMMANDS) > 15
    assert all(c.startswith(("qsd ", "make ", "python ", "pip install -e ")) for c in COMMANDS)


def test_python_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for block in (block for block in blocks if "qsd.mm" not in block):  # those: tests/mm/test_conversion.py
        exec(block.replace("224, 224", "32, 32").replace('"qsd_15m", num', f'"qsd_15m", **{SIZES}, num'), names)
    torch.testing.assert_close(names["trace"].logits, names["logits"])
    assert names["hasty"].shape == (2, 10)
    assert torch.equal(names["loaded"](names["images"]), names["logits"])
    assert names["size"].packed_bytes < names["size"].float_bytes / 4
    assert names["logits"].shape == (2, 10)
    assert [tuple(f.shape[-2:]) for f in names["pyramid"]] == [(8, 8), (4, 4), (2, 2), (2, 2)]


def test_the_files_it_names_exist():
    for path in re.findall(r"(?:configs|tools)/\w+\.(?:yaml|py)", README):
        assert (ROOT / path).is_file(), path


def test_the_demonstration_runs_from_any_folder(tmp_path, tool, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [o for o in SHORT if "model_args" not in o]
    evaluate_too = [o for o in options if "num_workers" not in o]
    assert tool("demo").main(["--images=8", "--", "--trainer.fast_dev_run=false", *evaluate_too]) == 0
    out = capsys.readouterr().out
    assert "test accuracy" in out
    for report in ("version_0/report.html", "version_0/test/report.html"):
        assert report in out
        assert (tmp_path / "runs/digits" / report).is_file()
    assert (tmp_path / "runs/digits/version_0/checkpoints/best.ckpt").is_file()
