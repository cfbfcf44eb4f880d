"""The command lines, from the user's end, on small data in the layouts of COCO and ADE20K."""

import json
import runpy
import sys
from itertools import pairwise

import pytest
import torch
from mmengine.registry import DefaultScope
from PIL import Image

from qsd.commands import demo, openmmlab, run
from qsd.commands.demo import scenes as maker
from tests.helpers import CONFIGS, ROOT, long
from tests.helpers.files import save_payload
from tests.helpers.mm import ADE_SCALES, COCO_SCALES, LITTLE, ONE_PROCESS, TINY_BACKBONE, scalars


@long
def test_the_documented_command_trains_and_validates_on_coco_s_layout(coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [
        f"data_root={coco}",
        "train_dataloader.batch_size=2",
        "train_cfg.max_epochs=1",
        *ONE_PROCESS,
        *COCO_SCALES,
    ]
    options.append("model.test_cfg.rcnn.score_thr=0.0")  # an untrained network is sure of nothing
    # `python tools/mmdet_train.py configs/coco_qsd.py`, from a folder that has no configurations
    monkeypatch.setattr(sys, "argv", ["mmdet_train.py", "configs/coco_qsd.py", "--cfg-options", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "mmdet_train.py"), run_name="__main__")
    assert ended.value.code == 0
    logged = scalars(tmp_path)
    assert "coco/bbox_mAP_50" in logged[-1]
    assert "coco/segm_mAP_50" in logged[-1]
    assert (tmp_path / "runs/coco_qsd/epoch_1.pth").is_file()


@long
def test_ade20k_qsd_trains_and_validates_on_ade20k_s_layout(tool, ade, tmp_path):
    options = [
        f"data_root={ade}", "train_dataloader.batch_size=2", "train_cfg.max_iters=2", "train_cfg.val_interval=2",
        "default_hooks.checkpoint.interval=2", *ONE_PROCESS, *ADE_SCALES,
    ]  # fmt: skip
    config = str(CONFIGS / "ade20k_qsd.py")
    assert tool("mmseg_train").main([config, "--work-dir", str(tmp_path), "--cfg-options", *options]) == 0
    assert "mIoU" in scalars(tmp_path)[-1]
    assert (tmp_path / "iter_2.pth").is_file()


FEW = [
    *LITTLE, *TINY_BACKBONE,
    "train_cfg.max_iters=3", "train_cfg.val_interval=3", "default_hooks.checkpoint.interval=3",
    "default_hooks.logger.interval=1", "train_dataloader.batch_size=4", "val_dataloader.batch_size=4",
    "param_scheduler=[]",  # without a warm-up three steps are enough to learn something
]  # fmt: skip


@pytest.fixture(scope="module")
def detector(tmp_path_factory, scenes):
    """Folder of a short training of the demonstration's detector."""
    return _demonstration(tmp_path_factory.mktemp("det"), "mmdet_train", "digits_det", scenes)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory, scenes):
    """Folder of a short training of the demonstration's segmenter."""
    return _demonstration(tmp_path_factory.mktemp("seg"), "mmseg_train", "digits_seg", scenes)


def _demonstration(folder, program, config, scenes):
    framework = program.partition("_")[0]
    train = {"mmdet": openmmlab.train_detector, "mmseg": openmmlab.train_segmenter}[framework]
    options = ["--work-dir", str(folder), "--cfg-options", f"data_root={scenes}", *FEW]
    if framework == "mmdet":
        options.append("model.test_cfg.rcnn.score_thr=0.0")
    assert train([str(CONFIGS / f"{config}.py"), *options]) == 0
    return folder


def test_the_detector_s_demonstration_learns_and_is_tested(tool, detector, scenes, tmp_path, capsys):
    logged = scalars(detector)
    losses = [row["loss"] for row in logged if "loss" in row]
    assert losses[-1] < losses[0]
    (rate,) = (row["spikes/rate"] for row in logged if "spikes/rate" in row)
    assert 0 < rate < 1
    assert (
        logged[-1]["spiking/latency_steps"]
        == json.loads((detector / "conversion.json").read_text())["latency"]["steps"]
    )
    checkpoint = str(detector / "iter_3.pth")
    config = str(CONFIGS / "digits_det.py")
    options = ["--work-dir", str(tmp_path), "--cfg-options", f"data_root={scenes}", *TINY_BACKBONE]
    options.append("model.test_cfg.rcnn.score_thr=0.0")
    assert tool("mmdet_test").main([config, checkpoint, *options]) == 0
    (result,) = tmp_path.rglob("2*.json")
    assert {"coco/bbox_mAP_50", "coco/segm_mAP_50", "spikes/rate"} <= json.loads(result.read_text()).keys()


def test_the_segmenter_s_demonstration_learns_and_is_tested(tool, segmenter, scenes, tmp_path):
    losses = [row["loss"] for row in scalars(segmenter) if "loss" in row]
    assert losses[-1] < losses[0]
    options = ["--work-dir", str(tmp_path), "--cfg-options", f"data_root={scenes}", *TINY_BACKBONE]
    config = str(CONFIGS / "digits_seg.py")
    assert tool("mmseg_test").main([config, str(segmenter / "iter_3.pth"), *options]) == 0
    (result,) = tmp_path.rglob("2*.json")
    assert "mIoU" in json.loads(result.read_text())


def test_training_goes_on_where_it_stopped(tool, segmenter, scenes):
    options = [f"data_root={scenes}", *FEW, "train_cfg.max_iters=4", "default_hooks.checkpoint.interval=4"]
    config = str(CONFIGS / "digits_seg.py")
    assert tool("mmseg_train").main([config, "--work-dir", str(segmenter), "--resume", "--cfg-options", *options]) == 0
    newest = max(segmenter.rglob("vis_data/scalars.json"), key=lambda path: path.stat().st_mtime)
    assert [row["iter"] for row in map(json.loads, newest.read_text().splitlines()) if "loss" in row] == [4]
    assert (segmenter / "iter_4.pth").is_file()


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_predictions_are_drawn_on_the_image(scenes, tmp_path, kind, request, capsys):
    checkpoint = request.getfixturevalue(kind) / "iter_3.pth"
    images = sorted((scenes / "images/test").glob("*.jpg"))[:2]
    arguments = [*map(str, images), "--model", str(checkpoint), "--out", str(tmp_path / "out"), "--score=0.0"]
    assert run.main(arguments) == 0
    for image in images:
        drawn = Image.open(tmp_path / "out" / f"{image.stem}.png")
        assert drawn.size == (160, 160)
        assert drawn.convert("RGB").tobytes() != Image.open(image).tobytes()
    assert "2 pictures" in capsys.readouterr().out
    damaged = tmp_path / "damaged.jpg"
    damaged.write_text("no picture")
    assert run.main([str(damaged), *arguments[2:]]) == 2
    assert "damaged.jpg cannot be read: " in capsys.readouterr().err


def test_scenes_share_neither_digits_nor_backgrounds():
    digits = [{image.tobytes() for image, _ in maker._digits(split.part)} for split in maker.SPLITS]
    assert [len(d) for d in digits] == [1197, 200, 400]
    assert sum(map(len, digits)) == len(set.union(*digits))
    spans = [split.columns for split in maker.SPLITS]
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_scenes_masks_boxes_and_maps_agree(scenes):
    from pycocotools.coco import COCO

    coco = COCO(scenes / "annotations/instances_training.json")
    assert len(coco.imgs) == 16
    for number in coco.imgs:
        classes = torch.tensor(list(Image.open(scenes / f"annotations/training/{number:05d}.png").tobytes()))
        expected = torch.ones(160, 160, dtype=torch.long)
        for annotation in coco.imgToAnns[number]:
            mask = torch.from_numpy(coco.annToMask(annotation)).bool()
            assert int(mask.sum()) == annotation["area"]
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            x, y, w, h = annotation["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + w, y + h) == (columns.max() + 1, rows.max() + 1)
            expected[mask] = annotation["category_id"] + 1
        assert torch.equal(classes.view(160, 160), expected)


def test_the_same_seed_makes_the_same_scenes(scenes, tmp_path):
    assert demo.main(["scenes", str(tmp_path / "again"), "--scenes", "16", "4", "4"]) == 0
    for path in scenes.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(scenes)).read_bytes()


def wrong_file(path):
    path.write_text("no checkpoint")
    return str(path)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("mmdet_train", ["missing.py"], "configuration missing.py does not exist"),
        ("mmdet_train", ["ade20k_qsd"], "is for mmseg, not for mmdet"),
        ("mmseg_train", ["digits_det"], "is for mmdet, not for mmseg"),
        ("mmdet_train", ["coco_qsd"], "data/coco does not exist; give yours with --cfg-options data_root=DIR"),
        ("mmdet_train", ["coco_qsd", "--amp", "--cfg-options", "data_root=COCO"], "--amp needs a CUDA device"),
        ("mmdet_train", ["coco_qsd", "--cfg-options", "modle.type=a"], "no setting 'modle'; did you mean 'model'?"),
        ("mmdet_train", ["coco_qsd", "--cfg-options", "model.type"], "--cfg-options model.type is no KEY=VALUE"),
        (
            "mmdet_train",
            ["digits_det", "--cfg-options", "data_root=SCENES", "model.backbone.modle=a"],
            ", model.backbone.modle=a: TypeError: SpikeTransformerBackbone.__init__() got an unexpected keyword",
        ),
        (
            "mmseg_train",  # found when the training begins
            ["digits_seg", "--cfg-options", "data_root=SCENES", "optim_wrapper.optimizer.lr=a"],
            ", optim_wrapper.optimizer.lr=a: TypeError: can't multiply",
        ),
        ("mmdet_train", ["coco_qsd", "--resume", "no.pth", "--cfg-options", "data_root=COCO"], "no.pth does not exist"),
        ("mmdet_test", ["coco_qsd", "no.pth"], "checkpoint no.pth does not exist"),
        ("mmdet_test", ["digits_det", "text.pth", "--cfg-options", "data_root=SCENES"], "text.pth cannot be read"),
        ("mmdet_test", ["digits_det", "other.pth", "--cfg-options", "data_root=SCENES"], "weight is missing"),
        ("mmdet_test", ["digits_det", "evil.pth", "--cfg-options", "data_root=SCENES"], "wants to run code"),
        ("mmseg_test", ["digits_seg", "evil.pth", "--cfg-options", "data_root=SCENES"], "wants to run code"),
        ("mmdet_train", ["digits_det", "--resume", "evil.pth", "--cfg-options", "data_root=SCENES"], "to run code"),
        ("mmdet_train", ["digits_det", "--pretrained", "evil.pth", "--cfg-options", "data_root=SCENES"], "to run code"),
        ("mmdet_train", ["digits_det", "--cfg-options", "load_from=evil.pth", "data_root=SCENES"], "wants to run code"),
        ("mmdet_train", ["digits_det", "--resume", "other.pth", "--cfg-options", "data_root=SCENES"], "'message_hub'"),
        (
            "mmdet_train",
            ["digits_det", "--cfg-options", "data_root=CUT"],
            "instances_training.json is no JSON, or is cut",
        ),
        ("mmdet_train", ["digits_det", "--cfg-options", "data_root=EMPTY"], "holds no images to train on"),
        ("mmdet_train", ["digits_det", "--cfg-options", "data_root=OTHER"], "has no category '9'"),
        (
            "mmdet_train",
            ["digits_det", "--cfg-options", "data_root=SCENES", "model.roi_head.mask_head.num_classes=7"],
            "model.roi_head.mask_head.num_classes=7, but the train data have 10 classes",
        ),
        (
            "mmseg_train",
            ["digits_seg", "--cfg-options", "data_root=SCENES", "model.decode_head.num_classes=5"],
            "model.decode_head.num_classes=5, but the train data have 11 classes",
        ),
        ("mmseg_train", ["digits_seg", "--cfg-options", "data_root=LABELS"], "holds the label 40"),
        ("mmdet_train", ["digits_det", "--cfg-options", "data_root=BARE"], ".jpg, which does not exist; correct data_"),
        (
            "mmseg_train",
            ["digits_seg", "--cfg-options", "data_root=BARE"],
            "training, which does not exist; correct data_",
        ),
        ("mmdet_train", ["digits_det", "--cfg-options", "data_root=COCO"], "instances_training.json"),
        (
            "mmdet_train",
            ["digits_det", "--pretrained", "no.ckpt", "--cfg-options", "data_root=SCENES"],
            "checkpoint no.ckpt does not exist",
        ),
    ],
)
def test_mistakes_give_one_line(tool, program, arguments, message, scenes, coco, spoilt, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    # mmengine names a training by the second that it starts in: one of this name would not become the current one.
    DefaultScope._instance_dict.clear()
    wrong_file(tmp_path / "text.pth")
    torch.save({"state_dict": {"head.weight": torch.ones(3)}}, "other.pth")
    save_payload(tmp_path / "evil.pth", tmp_path / "mark")
    folders = {"SCENES": scenes, "COCO": coco, **spoilt}
    words = [str(CONFIGS / f"{a}.py") if (CONFIGS / f"{a}.py").is_file() else a for a in arguments]
    for key, folder in folders.items():
        words = [word.replace(f"data_root={key}", f"data_root={folder}") for word in words]
    assert tool(program).main(words) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith(f"{program}: error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "mark").exists()


@pytest.fixture(scope="module")
def spoilt(scenes, tmp_path_factory):
    """Scenes without images, with other classes or labels beyond them, without files of images, with half a file."""
    spoilt, folder = {}, tmp_path_factory.mktemp("spoilt")
    for key in ("EMPTY", "OTHER", "LABELS", "BARE", "CUT"):
        copy = spoilt[key] = folder / key.lower()
        (copy / "annotations").mkdir(parents=True)
        if key != "BARE":
            (copy / "images").symlink_to(scenes / "images")
        for file in (scenes / "annotations").glob("*.json"):
            content = json.loads(file.read_text())
            if key == "EMPTY":
                content["images"] = content["annotations"] = []
            if key == "OTHER":
                content["categories"] = content["categories"][:9]
            text = json.dumps(content)
            (copy / "annotations" / file.name).write_text(text[: len(text) // 2] if key == "CUT" else text)
        for part in ("training", "validation", "test"):
            (copy / "annotations" / part).mkdir()
            for file in (scenes / "annotations" / part).glob("*.png"):
                image = Image.open(file)
                (image.point(lambda v: 40) if key == "LABELS" else image).save(copy / "annotations" / part / file.name)
    return spoilt


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing.pth", "does not exist"), ("text.pth", "cannot be read"), ("weights.pth", "no checkpoint of a training")],
)
def test_a_wrong_checkpoint_draws_nothing(scenes, tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    wrong_file(tmp_path / "text.pth")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, "weights.pth")
    image = str(next((scenes / "images/test").glob("*.jpg")))
    assert run.main([image, "--model", name, "--out", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_of_scenes_is_kept(scenes, capsys):
    before = sorted(path.name for path in scenes.rglob("*"))
    assert demo.main(["scenes", str(scenes)]) == 2
    assert "exists" in capsys.readouterr().err
    assert sorted(path.name for path in scenes.rglob("*")) == before
