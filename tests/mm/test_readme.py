"""The README's commands for mmdet and mmseg run, shortened."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch

from tests.helpers import CONFIGS
from tests.helpers.mm import ADE_SCALES, COCO_SCALES, LITTLE, ONE_PROCESS

README = (CONFIGS.parent / "README.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
COMMANDS = [line for line in LINES if re.match(r"python tools/(mm|make_)", line)]
NARROW = {"embed_dims": (8, 8, 16, 16), "depth": 2, "num_heads": 2}
TINY = [
    *(f'model.backbone.model_args.{key}="{value}"' for key, value in NARROW.items()),
    "model.neck.in_channels=[8,8,16,16]", "train_dataloader.batch_size=2",
]  # fmt: skip
SHORT = {
    "coco_qsd": ["train_cfg.max_epochs=1", "model.roi_head.bbox_head.fc_out_channels=32", *COCO_SCALES],
    "ade20k_qsd": ["train_cfg.max_iters=1", "train_cfg.val_interval=1", *ADE_SCALES],
    "digits_det": ["train_cfg.max_iters=1", "train_cfg.val_interval=1", *LITTLE],
    "digits_seg": ["train_cfg.max_iters=1", "train_cfg.val_interval=1", *LITTLE],
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, coco, ade, scenes):
    """A folder as the README's reader has it; what one command writes, the next ones use."""
    root = tmp_path_factory.mktemp("readme")
    shutil.copytree(CONFIGS, root / "configs")
    for name, folder in (("COCO", coco), ("ADE20K", ade)):
        (root / name).symlink_to(folder)
    shutil.copy(next((scenes / "images/test").glob("*.jpg")), root / "IMAGE")
    torch.save(timm.create_model("qsd_15m", num_classes=5, **NARROW).state_dict(), root / "CHECKPOINT")
    return root


def shortened(command):
    """A command of the README as its program's name and its arguments, made small."""
    script, *words = shlex.split(command)[1:]
    program = Path(script).stem
    if program == "make_digit_scenes":
        words += ["--scenes", "8", "2", "2"]
    elif program == "mm_convert":
        words += ["--max-images", "1", "--step-images", "1", "--leave-out", "compare"]
    elif program != "mm_predict":
        name = Path(words[0]).stem
        words += [] if "--cfg-options" in words else ["--cfg-options"]
        words += SHORT[name] + (TINY + ONE_PROCESS if "qsd" in name else TINY[-1:])
    # A short training ends early; its last checkpoint stands in for the one of the full recipe.
    words = [(Path(w).parent / "last_checkpoint").read_text() if w.endswith(".pth") else w for w in words]
    return program, words


def test_the_commands_run_one_after_the_other(workplace, tool, monkeypatch):
    monkeypatch.chdir(workplace)
    for command in COMMANDS:
        program, words = shortened(command)
        assert tool(program).main(words) == 0, command
    assert (workplace / "pictures" / "IMAGE.png").is_file()
    assert (workplace / "converted" / "report.html").is_file()


def test_every_tool_of_openmmlab_is_in_the_readme():
    named = {Path(shlex.split(line)[1]).stem for line in COMMANDS}
    tools = {path.stem for path in (CONFIGS.parent / "tools").glob("mm*.py")} - {"mm_demo"}
    assert tools <= named
