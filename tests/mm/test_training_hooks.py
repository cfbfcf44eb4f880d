"""The hooks around a training: conversion behind it, distillation within it."""

import copy
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, init_default_scope
from torch import nn

import qsd.mm
from qsd import QsdError
from qsd.distillation import AttentionRecorder, attention_loss
from qsd.mm import ConvertToSpikeDrivenHook, DistillationHook
from qsd.mm.command import build_runner
from qsd.mm.loading import load_model
from qsd.report import FILES
from tests.helpers import CONFIGS
from tests.helpers.conversions import undraw
from tests.helpers.mm import NARROW

WRITTEN = set(FILES)


def config(scenes, folder, *hooks, **options):
    """Two steps of a small segmenter, with hooks."""
    config = Config.fromfile(CONFIGS / "digits_seg.py")
    config.merge_from_dict(
        {
            "model.backbone.model_args": NARROW,
            "model.neck.in_channels": [8, 8, 16, 16],
            "model.neck.out_channels": 16,
            "model.decode_head.in_channels": [16] * 4,
            "model.decode_head.channels": 16,
            "train_cfg.max_iters": 2,
            "train_cfg.val_interval": 2,
            "default_hooks.checkpoint.interval": 2,
            "train_dataloader.batch_size": 2,
            **options,
        }
    )
    for loader in ("train", "val", "test"):
        config[f"{loader}_dataloader"].dataset.data_root = str(scenes)
    config.custom_hooks = list(hooks)
    config.work_dir, config.launcher = str(folder), "none"
    return config


@pytest.fixture(scope="module")
def teacher(scenes, tmp_path_factory):
    """A checkpoint of a segmenter's float twin."""
    path = tmp_path_factory.mktemp("teacher") / "twin.pth"
    twin = config(scenes, path.parent)
    twin.model.backbone.update(model="qsd_tiny_ann", model_args=NARROW)
    for part in (twin.model.neck, twin.model.decode_head):
        part.spike_cfg.update(time_steps=0, weight_bits=0)
    init_default_scope("mmseg")
    torch.manual_seed(7)
    model = MODELS.build(twin.model)
    meta = {"cfg": twin.pretty_text, "dataset_meta": {"classes": ("a",)}}
    torch.save({"meta": meta, "state_dict": model.state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def run(scenes, teacher, tmp_path_factory):
    """A training with distillation that ends with a conversion."""
    folder = tmp_path_factory.mktemp("run")
    hook = dict(type="ConvertToSpikeDrivenHook", max_images=4, step_images=1)
    hooks = [dict(type="DistillationHook", teacher=teacher), hook]
    with pytest.MonkeyPatch.context() as patch:
        undraw(patch)
        build_runner(config(scenes, folder, *hooks, **{"default_hooks.logger.interval": 1}), ("train", "val")).train()
    return folder


def test_a_training_ends_with_the_files_of_its_conversion(run):
    assert {path.name for path in run.iterdir()} >= WRITTEN
    record = json.loads((run / "conversion.json").read_text())
    (best,) = run.glob("best_mIoU_iter_*.pth")
    assert record["model"]["checkpoint"] == str(best)
    assert [c["changed_images"] for c in record["comparison"] if c["dtype"] == "float64"] == [0, 0]
    metrics = {m["name"]: m for m in record["accuracy"]["metrics"]}
    scalars = [json.loads(line) for path in run.rglob("scalars.json") for line in path.read_text().splitlines()]
    (validated,) = (row["mIoU"] for row in scalars if "mIoU" in row)
    assert metrics["mIoU"]["quantized"] == validated, "all validation scenes, by the data set's own metric"
    (logged,) = (row for row in scalars if "spiking/latency_steps" in row)
    assert logged["spiking/latency_steps"] == record["latency"]["steps"]
    assert logged["spiking/mIoU"] == metrics["mIoU"]["spiking"]


NOTHING_SAVED = {"interval": -1, "save_last": False, "save_best": None}


def test_the_last_weights_are_converted_where_nothing_is_saved(scenes, tmp_path):
    hook = dict(type="ConvertToSpikeDrivenHook", max_images=1, step_images=1, stages=())
    options = {f"default_hooks.checkpoint.{key}": value for key, value in NOTHING_SAVED.items()}
    build_runner(config(scenes, tmp_path, hook, **options), ("train", "val")).train()
    record = json.loads((tmp_path / "conversion.json").read_text())
    assert record["model"]["checkpoint"] is None
    assert record["accuracy"]["metrics"] == [], "one of four validation scenes"
    assert not list(tmp_path.glob("*.pth"))


def test_a_conversion_that_fails_names_the_safe_checkpoint_and_leaves_no_files(run, scenes, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of ideas")

    runner = build_runner(config(scenes, tmp_path, lean=False), ("train", "val"))
    assert not any(getattr(module, "lean", False) for module in runner.model.modules())
    (best,) = run.glob("best_mIoU_iter_*.pth")
    runner.message_hub.update_info("best_ckpt", str(best))
    monkeypatch.setattr("qsd.report.files.html", fail)
    hook = ConvertToSpikeDrivenHook(max_images=1, step_images=1, stages=())
    hook.before_train(runner)
    with pytest.raises(QsdError, match=rf"safe in {best}, but its conversion failed: RuntimeError: out of ideas"):
        hook.after_train(runner)
    assert not WRITTEN & {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".unfinished-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.decode_head.spike_cfg": dict(time_steps=0)}, r"layer decode_head\.\S+ is the ReLU of a float twin"),
        ({"val_dataloader": None, "val_cfg": None, "val_evaluator": None}, "verifies on validation images"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_before_the_training(options, message, scenes, tmp_path):
    wanted = config(scenes, tmp_path)
    wanted.merge_from_dict({key: value for key, value in options.items() if value is not None})
    for key in [key for key, value in options.items() if value is None]:
        wanted[key] = None
    runner = SimpleNamespace(model=MODELS.build(wanted.model), val_loop=None, logger=logging.getLogger())
    if wanted.val_cfg is not None:
        runner.val_loop = object()
    with pytest.raises(QsdError, match=message):
        ConvertToSpikeDrivenHook().before_train(runner)


def test_a_float_twin_is_left_as_it_is(caplog):
    runner = SimpleNamespace(model=nn.Conv2d(3, 4, 1), logger=logging.getLogger("twin"))
    hook = ConvertToSpikeDrivenHook()
    hook.before_train(runner)
    hook.after_train(runner)
    assert "will not be converted" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stages=["delays"]), "stage 'delays' is unknown"),
        (dict(delay=-1), "delay=-1 is negative"),
        (dict(preset="fp8"), "preset='fp8' is unknown"),
        (dict(merge="half"), "merge='half' is unknown"),
        (dict(step_images=0), "step_images=0 is not positive"),
    ],
)
def test_wrong_options_of_the_conversion_are_named(options, message):
    with pytest.raises(QsdError, match=message):
        HOOKS.build(dict(type="ConvertToSpikeDrivenHook", **options))


# -- distillation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def student(scenes, tmp_path):
    init_default_scope("mmseg")
    return MODELS.build(config(scenes, tmp_path).model)


def batch():
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo={"img_shape": (64, 64), "ori_shape": (64, 64)})
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 11, (1, 64, 64)))
        samples.append(sample)
    return torch.randn(2, 3, 64, 64), samples


def runner(model, iteration=0):
    return SimpleNamespace(model=model, iter=iteration, max_iters=100, logger=logging.getLogger())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_terms_of_distillation_enter_the_optimisation(student, teacher):
    images, samples = batch()
    other = copy.deepcopy(student)
    hook = DistillationHook(teacher, attention_weight=0.5)
    hook.before_train(runner(student))
    torch.manual_seed(3)  # of the head's dropout
    losses = student.train()(images, copy.deepcopy(samples), mode="loss")
    total, logged = student.parse_losses(losses)
    total.backward()
    # The same by hand: the model's own losses, and the distance of its attention from the teacher's.
    other.train()
    recorder = AttentionRecorder(other.backbone)
    twin = load_model(teacher)[0].backbone.model
    reference = AttentionRecorder(twin)
    recorder.start()
    torch.manual_seed(3)
    own = other(images, samples, mode="loss")
    reference.start()
    with torch.no_grad():
        twin(images)
    terms = attention_loss(recorder.take(), reference.take())
    (other.parse_losses(own)[0] + 0.5 * sum(terms.values())).backward()
    for name, term in terms.items():
        assert float(logged[f"loss_{name}"]) == pytest.approx(0.5 * term.item(), rel=1e-5)
    assert set(logged) == {*own, "loss", "loss_query", "loss_key", "loss_value"}
    expected = gradients(other)
    assert any("q_proj" in name for name in expected)
    largest = max(gradient.abs().max() for gradient in expected.values())  # biases in front of norms have none
    for name, gradient in gradients(student).items():
        assert (gradient - expected[name]).abs().max() <= 1e-3 * expected[name].abs().max() + 1e-6 * largest, name


def test_the_teacher_stays_outside_the_model(student, teacher):
    images, samples = batch()
    before = set(student.state_dict()), len(list(student.modules()))
    hook = DistillationHook(teacher)
    hook.before_train(runner(student))
    student.train()(images, samples, mode="loss")
    assert (set(student.state_dict()), len(list(student.modules()))) == before
    hook.after_train(runner(student))
    assert "loss_query" not in student(images, samples, mode="loss")
    assert not any(module._forward_hooks for module in student.modules())


def test_a_schedule_ends_the_distillation(student, teacher):
    images, samples = batch()
    progress = runner(student, iteration=25)
    hook = DistillationHook(teacher, attention_weight=[(0.0, 1.0), (0.5, 0.0)])
    hook.before_train(progress)
    student.train()
    halfway = student(images, samples, mode="loss")["loss_query"]
    progress.iter = 0
    assert student(images, samples, mode="loss")["loss_query"].item() > halfway.item() > 0
    progress.iter = 60
    assert "loss_query" not in student(images, samples, mode="loss")


def test_distillation_and_conversion_work_in_one_training(run):
    (scalars,) = run.rglob("scalars.json")
    rows = [json.loads(line) for line in scalars.read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 2
    for row in steps:
        parts = [value for key, value in row.items() if "loss" in key and key != "loss"]
        assert row["loss"] == pytest.approx(sum(parts), rel=1e-4)
        assert row["loss_query"] > 0
    (saved,) = run.glob("best*.pth")
    state = torch.load(saved, weights_only=False)["state_dict"]
    assert not any("teacher" in key for key in state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention_weight=0.0), "nothing is distilled"),
        (dict(attention_weight=-1.0), "attention_weight=-1.0 is negative"),
        (dict(logits_weight=1.0), "no image logits"),
        (dict(teacher_mean=[0.5]), "teacher_mean and teacher_std belong together"),
    ],
)
def test_wrong_options_of_distillation_are_named(options, message):
    with pytest.raises(QsdError, match=message):
        HOOKS.build(dict(type="DistillationHook", teacher="twin.pth", **options))


def test_the_name_of_the_weight_in_version_0_1_0_is_understood():
    with pytest.warns(FutureWarning, match="attention_weight"):
        hook = DistillationHook("twin.pth", weight=0.5)
    assert hook.options.attention_weight == 0.5


def test_a_missing_teacher_and_a_backbone_without_attention_are_named(student, teacher):
    with pytest.raises(QsdError, match=r"no\.pth does not exist"):
        DistillationHook("no.pth").before_train(runner(student))
    student.backbone = nn.Identity()
    with pytest.raises(QsdError, match="the student, a Identity, has no attention"):
        DistillationHook(teacher).before_train(runner(student))


def test_the_teacher_sees_the_normalisation_of_the_data(student):
    from qsd.mm.hooks.distillation import _statistics

    mean, std = _statistics(student.data_preprocessor)
    assert mean == pytest.approx([0.485, 0.456, 0.406])
    assert std == pytest.approx([0.229, 0.224, 0.225], abs=1e-4)
    assert qsd.mm.DistillationHook is DistillationHook
