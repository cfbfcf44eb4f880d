"""README and documentation are true: each of their commands and examples runs, shortened and in-process."""

import json
import re
import shlex
import shutil
import subprocess
import tarfile
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import qsd
import qsd_launcher
from qsd.data import DigitEvents, DigitsData, ImageArray
from qsd.data.events import RecordingArrays
from qsd.export import to_onnx
from tests.helpers import LONG, ROOT
from tests.helpers.conversions import shorten_conversions, undraw
from tests.helpers.documents import MM, PAGES, blocks, commands, inline_commands, read, subcommand

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None

COMMANDS = [command for command in commands() if not MM.match(command)]
TRAINING = ("fit", "validate", "test", "predict")
# Commands that no test of this file runs, and the reason.
EXEMPT = {
    "python tools/ablation.py": "39 trainings; tests/test_distillation_tools.py runs it with tiny ones",
    "python docs/pictures/draw.py": "tests/docs/test_site.py draws the pictures",
    "qsd benchmark --device cuda": "it needs a device; tests/commands/test_benchmark.py runs its parts on a processor",
    "python docs/read_integers.py digits-integers": "tests/export/test_integer_files.py runs it on other folders",
}

SIZES = {"embed_dims": [8, 8, 8, 8], "num_heads": 2, "depth": 2}
CSD_SIZES = {"embed_dims": 8, "num_heads": 2, "depth": 1}
SHORT = [
    "--model.model_args=" + json.dumps(SIZES), "--data.img_size=32", "--data.num_workers=0", "--data.batch_size=8",
    "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=2",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip
SHORT_CSD = ["--model.model_args=" + json.dumps(CSD_SIZES), *SHORT[1:]]
EVALUATE = [option for option in SHORT if "max_epochs" not in option and "limit_train" not in option]
DEMO = [option for option in SHORT if "model_args" not in option and "num_workers" not in option]
# The options that shorten each subcommand of qsd and each tool, and a part of its output.
SUBCOMMANDS = {
    "convert": (["--max-images=4", "--step-images=2", "--data.img_size=32"], "report: "),
    "export": (["--max-images=8", "--data.img_size=32"], " MB; use it with "),
    "run": ([], "Predictions"),
    "analyze": (["--max-images=4", "--data.img_size=32"], "page: "),
    "profile": ([], "8.257 G"),
    "import-checkpoint": (["--num-heads=4"], "imported.ckpt: "),
    "benchmark": (["--quick", "--rounds=1", "--img-size=32", "--no-memory", "--model=qsd_tiny"], "benchmark.json"),
    "results": ([], "| recipe |"),
    "demo": (["--max-images=2", "--", "--trainer.fast_dev_run=false", *DEMO], "test accuracy"),
    "--help": ([], "import-checkpoint"),
}
TOOLS = {
    "compare_activations": (["--", *SHORT_CSD], "qcfs"),
    "distill": ([*SHORT, "--trainer.limit_test_batches=1"], "_distill.yaml"),
}
MAKE = {
    "demo": "qsd demo", "demo-events": "qsd demo events", "demo-detection": "qsd demo detection",
    "demo-segmentation": "qsd demo segmentation",
    "test": "pytest", "check": "pytest", "test-long": "QSD_TEST_LONG=1", "test-cuda": "test_cuda.py",
    "lint": "ruff check", "docs": "sphinx",
}  # fmt: skip


def of_kind(pattern):
    return [command for command in COMMANDS if re.match(pattern, command) and command not in EXEMPT]


def test_no_command_is_left_out():
    run = {f"qsd {name}" for name in (*TRAINING, *SUBCOMMANDS)} | {f"python tools/{name}.py" for name in TOOLS}
    run |= {f"make {target}" for target in MAKE} | {"pip install"}
    for command in COMMANDS:
        assert command in EXEMPT or " ".join(command.split()[:2]) in run, command
    assert all(command in COMMANDS for command in EXEMPT)
    assert set(qsd_launcher.SUBCOMMANDS) <= {subcommand(c) for c in commands() if c.startswith("qsd ")}


@pytest.fixture(scope="module", autouse=True)
def _few_digits():
    """Sixteen digits for each part of the data instead of hundreds."""
    load_all = DigitsData.load_part

    def load_part(self, part):
        source = load_all(self, part)
        images = np.stack([np.asarray(source.load(i)) for i in range(16)])
        return ImageArray(images, source.labels[:16], [source.name(i) for i in range(16)])

    record_all = DigitEvents.load_part

    def record_part(self, part):
        source = record_all(self, part)
        return RecordingArrays(source.events[:16], source.labels[:16], ["digit"] * 16, self.binning())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitsData, "load_part", load_part)
        patch.setattr(DigitEvents, "load_part", record_part)
        yield


# -- trainings ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Train a configuration, once; gives the folder that its runs lie in."""
    folders = {}

    def train(name, short):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folders[name])
                shorten_conversions(patch)
                assert qsd_launcher.main(["fit", "--config", str(ROOT / f"configs/{name}.yaml"), *short]) == 0
        return folders[name] / "runs" / name

    return train


@pytest.fixture
def workplace(tmp_path, tree, reference_state, monkeypatch):
    """A folder as a reader has it: configurations, data, a checkpoint of the published code."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    torch.save({"model": reference_state}, tmp_path / "REFERENCE.pth")
    return tmp_path


def bring_run(command, finished):
    """The training whose checkpoint the command names."""
    for name, short in (("digits", SHORT), ("csdformer_digits", SHORT_CSD)):
        if f"runs/{name}/" in command or f"configs/{name}.yaml --ckpt_path last" in command:
            shutil.copytree(finished(name, short), f"runs/{name}")


def import_reference(target):
    assert qsd_launcher.main(["import-checkpoint", "REFERENCE.pth", target, "--num-heads=4"]) == 0


@pytest.mark.parametrize("command", of_kind(f"qsd ({'|'.join(TRAINING)}) "))
def test_trainings(command, workplace, tree, finished, monkeypatch):
    bring_run(command, finished)
    shorten_conversions(monkeypatch)
    if "SHARDS" in command:
        _write_shards(Path("SHARDS"))
    if "cifar" in command or "fashion_mnist" in command:
        monkeypatch.setattr("qsd.data.TorchvisionData.load_part", _noise)
        torch.save(timm.create_model("qsd_15m", num_classes=5, **SIZES).state_dict(), "CHECKPOINT")
        command = command.replace("--data.download true", "")  # no network in a test
    if "teacher CHECKPOINT" in command:
        _save_teacher("CHECKPOINT", *((3, 2) if "DIR" in command else (1, 10)))
    if "imported.ckpt" in command:
        import_reference("imported.ckpt")
    words = [str(tree) if word == "DIR" else word for word in shlex.split(command)[1:]]
    short = SHORT_CSD if "csdformer" in command else SHORT
    short = [*short, "--trainer.precision=32"] if words[0] == "fit" else EVALUATE
    if "ckpt_path" in command:  # the model comes from the checkpoint
        short = [option for option in short if "model_args" not in option]
    if "--trainer.devices" in words:  # as another process starts it, it is tested with the distributed tests
        words = words[: words.index("--trainer.devices")]
    compiled = "eager" if LONG else "false"  # the longest of them all; tests/tasks compiles too
    words = [
        word.replace("true", compiled) if words[i - 1] == "--model.compile" else word for i, word in enumerate(words)
    ]
    if "--print_config" in words:
        short = []
    assert qsd_launcher.main([*words, *short]) == 0
    if words[0] == "predict":
        assert len(list(workplace.rglob("predictions.csv"))) == 1


def _save_teacher(path, in_chans, num_classes):
    """What a training of the float twin leaves, as far as it is read."""
    sizes = {**SIZES, "in_chans": in_chans}
    twin = timm.create_model("qsd_tiny_ann", num_classes=num_classes, **sizes)
    hyper_parameters = {"model": "qsd_tiny_ann", "model_args": sizes, "num_classes": num_classes}
    torch.save({"state_dict": twin.state_dict(), "hyper_parameters": hyper_parameters}, path)


def _save_tiny_checkpoint(path):
    sizes = {**CSD_SIZES, "time_steps": 2}
    hyper_parameters = {"model": "csdformer_4_256", "model_args": sizes, "num_classes": 2}
    network = timm.create_model("csdformer_4_256", num_classes=2, **sizes)
    weights = {f"model.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": hyper_parameters}, path)


def _write_shards(folder):
    """Two small shards, as WebDataset lays them out."""
    folder.mkdir()
    picture = BytesIO()
    Image.new("RGB", (20, 16), (200, 100, 0)).save(picture, "JPEG")
    for split in ("train", "val"):
        with tarfile.open(folder / f"set-{split}-0000.tar", "w") as archive:
            for number in range(16):
                for ending, content in (("jpg", picture.getvalue()), ("cls", b"%d" % (number % 2))):
                    entry = tarfile.TarInfo(f"{number}.{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, BytesIO(content))


def _noise(self, part):
    """In place of the files of CIFAR and of Fashion-MNIST."""
    images = np.random.RandomState(0).randint(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    return ImageArray(images, [0, 1] * 4, [f"{part} {i}" for i in range(8)])


# -- other commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", of_kind(f"qsd ({'|'.join(SUBCOMMANDS)})"))
def test_subcommands(command, workplace, tree, finished, exported, monkeypatch, capsys):
    if command == "qsd demo events" and not LONG:
        pytest.skip("it is long; `make test-long` runs it, and tests/tasks/test_event_recipes.py trains on recordings")
    undraw(monkeypatch)  # tests/report looks at the pictures
    bring_run(command, finished)
    if "CHECKPOINT" in command and "--calibrate" not in command:
        import_reference("CHECKPOINT")
    if "BEFORE" in command:
        trained = finished("digits", SHORT) / "version_0/checkpoints/best.ckpt"
        for name in ("BEFORE", "AFTER", "TEACHER"):
            shutil.copy(trained, name)
    if "digits.onnx" in command and command.startswith("qsd run"):
        _bring_exported_file(exported)
    if "IMAGE" in command:
        Image.new("RGB", (40, 30), (200, 100, 0)).save("IMAGE", "PNG")
    if "--calibrate" in command:  # every delay of every neuron is measured: a network with few of them
        _save_tiny_checkpoint("CHECKPOINT")
    if command.startswith("qsd demo"):
        shorten_conversions(monkeypatch, stages=("delays", "energy"))
    words = [str(tree) if word == "DIR" else word for word in shlex.split(command)[1:]]
    short, says = SUBCOMMANDS[words[0]]
    if command == "qsd demo":
        short = [*short, SHORT[0]]
    if "events" in words:  # the recordings of one size are simulated once
        short = [option.replace("img_size=32", "img_size=16") for option in short]
    assert qsd_launcher.main([*words, *short]) == 0
    assert says in capsys.readouterr().out
    if words[0] == "export":
        target = words[words.index("--out") + 1]
        assert Path(target).exists()
        if target == "digits.onnx":
            shutil.copy(target, exported)
    if command == "qsd demo":
        for path in ("report.html", "test/report.html", "checkpoints/best.ckpt"):
            name = "digit_events" if "events" in command else "digits"
            assert (workplace / "runs" / name / "version_0" / path).is_file()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Where the command before ``qsd run`` leaves its file."""
    return tmp_path_factory.mktemp("exported") / "digits.onnx"


def _bring_exported_file(exported):
    """The file of the command before, or another one if that ran in another process."""
    if exported.is_file():
        shutil.copy(exported, "digits.onnx")
    else:
        spiking = qsd.to_spike_driven(timm.create_model("qsd_tiny", num_classes=3, **SIZES).eval())
        to_onnx(
            spiking, "digits.onnx", notes={"class_names": ["cat", "dog", "cow"], "mean": [0.5] * 3, "std": [0.2] * 3}
        )


@pytest.mark.parametrize("command", [command for command in of_kind("python ") if command not in EXEMPT])
def test_tools(command, workplace, tree, tool, monkeypatch, capsys):
    shorten_conversions(monkeypatch)
    script, *arguments = (str(tree) if word == "DIR" else word for word in shlex.split(command)[1:])
    short, says = TOOLS[Path(script).stem]
    assert tool(Path(script).stem).main([*arguments, *short]) == 0
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("command", of_kind("make "))
def test_make_targets(command):
    done = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert MAKE[subcommand(command)] in done.stdout


@pytest.mark.skipif(tomllib is None, reason="Python 3.10 has no tomllib")
def test_installations_name_extras_that_exist():
    extras = set(tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"])
    for command in [*of_kind("pip "), *(code for code in inline_commands() if code.startswith("pip "))]:
        program, verb, *options, what = shlex.split(command)
        assert (program, verb) == ("pip", "install")
        assert options in ([], ["-e"])
        assert re.fullmatch(r"\.(\[\w+\])?", what), command
        assert set(re.findall(r"\w+", what)) <= extras


def test_commands_in_sentences_exist():
    for command in inline_commands():
        program, name = command.split()[:2]
        if program in ("qsd", "lightning"):
            assert name in qsd_launcher.SUBCOMMANDS or name in ("--version", "--help"), command
        if program == "make":
            assert name in MAKE, command
        if program == "python" and name != "-m":
            assert (ROOT / name).is_file(), command


# -- examples, files, links --------------------------------------------------------------------------------------------

# These examples register rules, formats and models for good, so they run in a process of their own.
ARCHITECTURE = "docs/architecture.md"


@pytest.mark.parametrize("page", sorted({b.page for b in blocks("python")} - {ARCHITECTURE}))
def test_python_examples(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Networks with weights have the sizes of these.
    small = lambda name, **kwargs: create(name, **(kwargs if set(".:") & set(name) else {**kwargs, **SIZES}))  # noqa: E731
    monkeypatch.setattr(timm, "create_model", small)
    names = {}
    for block in (b for b in blocks("python") if b.page == page):
        if "qsd.mm" not in block.text:  # those: tests/mm/test_documents.py
            exec(block.text, names)
    if "trace" in names:
        torch.testing.assert_close(names["trace"].logits, names["logits"])
    if "early" in names:
        assert torch.equal(names["loaded"](names["images"]), names["logits"])
        assert names["early"].shape == names["logits"].shape
        assert names["size"].packed_bytes < names["size"].float_bytes


create = timm.create_model


def test_examples_of_extensions(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    text = "\n".join(block.text for block in blocks("python") if block.page == ARCHITECTURE)
    # A fork has all libraries; importing them would take longer than the examples.
    process = get_context("fork").Process(target=exec, args=(text, {"__name__": "__main__"}))
    process.start()
    process.join()
    assert process.exitcode == 0, capfd.readouterr().err


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_exist(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
    for page, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text):
        headings = re.findall(r"^#+ (.*)$", (path.parent / page if page else path).read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings], anchor
    for name in re.findall(r"(?:configs|tools|tests)/[\w/]+\.(?:yaml|py)", text):
        assert (ROOT / name).is_file(), name
    for module in re.findall(r"`(qsd(?:\.\w+)+)[`(]", text):
        assert _resolves(module), module


def _resolves(dotted):
    """Whether a dotted name is a module, or an attribute of one."""
    parts = dotted.split(".")
    if parts[1] == "mm":  # needs OpenMMLab
        return len(parts) == 2 or (ROOT / "qsd/mm").joinpath(f"{parts[2]}.py").is_file() or hasattr(qsd, "mm")
    for length in range(len(parts), 0, -1):
        try:
            found = __import__(".".join(parts[:length]), fromlist=["_"])
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name, None)
        return found is not None
    return False


def test_neuron_twin_and_proof_are_two_clicks_from_the_readme():
    readme = read("README.md")
    for target, symbol in (
        ("qsd/neurons.py", "class SpikeNeuron"),
        ("qsd/spiking/layers/neuron.py", "class DelayedNeuron"),
        ("docs/theory.md", "**Proof for"),
    ):
        assert f"]({target}" in readme
        assert symbol in read(target)


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 180


def test_the_citation_names_the_newest_release_and_the_papers():
    citation = yaml.safe_load(read("CITATION.cff"))
    release = re.search(r"^## (\d+\.\d+\.\d+)\b", read("CHANGELOG.md"), re.MULTILINE)
    assert release
    assert (citation["cff-version"], citation["version"], citation["license"]) == ("1.2.0", release[1], "MIT")
    assert {"message", "title", "authors"} <= set(citation)
    papers = [paper["title"] for paper in citation["references"]]
    assert "Quantized Spike-driven Transformer" in papers
    assert all({"type", "title", "authors"} <= set(paper) for paper in citation["references"])


def test_no_page_is_missing_from_the_site():
    contents = read("docs/index.md") + read("docs/api/index.md")
    for path in (ROOT / "docs").rglob("*.md"):
        assert path.stem == "index" or re.search(rf"^(api/)?{path.stem}$", contents, re.MULTILINE), path
