"""The commands and examples for mmdet and mmseg in README and documentation run, shortened."""

import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch

import qsd_launcher
from tests.helpers import CONFIGS
from tests.helpers.conversions import shorten_conversions
from tests.helpers.documents import MM, commands
from tests.helpers.mm import (
    ADE_SCALES,
    COCO_SCALES,
    LITTLE,
    NARROW,
    NARROW_DETECTOR,
    NARROW_SEGMENTER,
    ONE_PROCESS,
    TINY_BACKBONE,
)

# In the order in which they use each other's files; that of the README would train before there are scenes.
COMMANDS = sorted((c for c in commands() if MM.match(c)), key=lambda c: not c.startswith("qsd demo scenes"))
TINY = [*TINY_BACKBONE, "train_dataloader.batch_size=2"]
SHORT = {
    "coco_qsd": ["train_cfg.max_epochs=1", *NARROW_DETECTOR, *COCO_SCALES],
    "ade20k_qsd": ["train_cfg.max_iters=1", "train_cfg.val_interval=1", *NARROW_SEGMENTER, *ADE_SCALES],
    "digits_det": ["train_cfg.max_iters=1", "train_cfg.val_interval=1", *NARROW_DETECTOR, *LITTLE],
    "digits_seg": ["train_cfg.max_iters=1", "train_cfg.val_interval=1", *NARROW_SEGMENTER, *LITTLE],
}
DEMOS = {
    "detection": [*SHORT["digits_det"], "model.test_cfg.rcnn.score_thr=0.0"],  # one iteration makes sure of nothing
    "segmentation": SHORT["digits_seg"],
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, coco, ade, scenes):
    """A folder as a reader has it; what one command writes, the next ones use."""
    root = tmp_path_factory.mktemp("documents")
    shutil.copytree(CONFIGS, root / "configs")
    for name, folder in (("COCO", coco), ("ADE20K", ade)):
        (root / name).symlink_to(folder)
    shutil.copy(next((scenes / "images/test").glob("*.jpg")), root / "IMAGE")
    torch.save(timm.create_model("qsd_15m", num_classes=5, **NARROW).state_dict(), root / "CHECKPOINT")
    # In place of the pretraining of the demonstrations.
    pretrained = root / "runs/digit_crops/version_0/checkpoints/best.ckpt"
    pretrained.parent.mkdir(parents=True)
    torch.save(timm.create_model("qsd_tiny", num_classes=10, **NARROW).state_dict(), pretrained)
    return root


def shortened(command):
    """The arguments of a command, made small."""
    program, *words = shlex.split(command)
    if program == "qsd":
        kind, short = words[0], []
        if kind == "demo":
            name = words[1]
            options = ["--cfg-options", *DEMOS.get(name, []), *TINY]
            short = ["--scenes", "8", "2", "2"] if name == "scenes" else options
        words = [*words, *short]
    else:
        name = Path(words[1]).stem
        words += [] if "--cfg-options" in words else ["--cfg-options"]
        words += SHORT[name] + TINY + (ONE_PROCESS if "qsd" in name else [])
    # A short training ends early; its last checkpoint stands in for the one of the full recipe.
    return [(Path(w).parent / "last_checkpoint").read_text() if w.endswith(".pth") else w for w in words]


@pytest.mark.timeout(900)  # a dozen trainings, tests and conversions
def test_the_commands_run_one_after_the_other(workplace, tool, monkeypatch):
    monkeypatch.chdir(workplace)
    shorten_conversions(monkeypatch)  # tests/mm/test_conversion.py measures
    for command in COMMANDS:
        words = shortened(command)
        main = qsd_launcher.main if command.startswith("qsd ") else tool(Path(words.pop(0)).stem).main
        shutil.rmtree("converted", ignore_errors=True)
        assert main(words) == 0, command
    assert (workplace / "pictures" / "IMAGE.png").is_file()
    assert (workplace / "converted" / "report.html").is_file()


def test_every_tool_of_openmmlab_is_documented():
    named = {Path(shlex.split(command)[1]).stem for command in COMMANDS if command.startswith("python ")}
    assert {"mmdet_train", "mmdet_test", "mmseg_train", "mmseg_test"} <= named
