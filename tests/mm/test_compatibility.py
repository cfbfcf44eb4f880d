"""Detectors and segmenters of version 0.1.0: they load, give the same outputs, and their trainings go on."""

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from safetensors.torch import load_file

import qsd
from qsd import QsdError, report
from qsd.mm.checks import check_weights
from qsd.mm.command import build_runner
from qsd.mm.loading import build_model, load_model
from qsd.packing import read_notes
from tests.helpers.version_0_1_0 import FOLDER, moments, parameters, present, unpacked

MODELS = ["detector", "segmenter"]


def outputs(model, inputs):
    """The outputs of all heads for two images, as version 0.1.0 was asked for them."""
    preprocessor = model.data_preprocessor
    features = model.extract_feat((inputs["images"].float() - preprocessor.mean) / preprocessor.std)
    if not hasattr(model, "roi_head"):
        return {"logits": model.decode_head(features)}
    scores, boxes = model.rpn_head(features)
    found = model.roi_head._bbox_forward(features, inputs["rois"])
    masks = model.roi_head._mask_forward(features, inputs["rois"])["mask_preds"][:2, :2]
    named = {f"rpn_cls.{i}": t for i, t in enumerate(scores)} | {f"rpn_reg.{i}": t for i, t in enumerate(boxes)}
    return {**named, "bbox_cls": found["cls_score"], "bbox_reg": found["bbox_pred"], "masks": masks}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_checkpoint_gives_the_same_outputs(name, tmp_path):
    expected = load_file(FOLDER / f"{name}_logits.safetensors")
    path = unpacked(f"{name}.pth", tmp_path)
    model, _ = load_model(path)
    check_weights(model, str(path))
    for key, found in outputs(model, expected).items():
        torch.testing.assert_close(found, expected[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: key + text)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_packed_file_gives_the_same_outputs(name, tmp_path):
    expected = load_file(FOLDER / f"{name}_logits.safetensors")
    path = unpacked(f"{name}_quantized.safetensors", tmp_path)
    trained, _ = load_model(unpacked(f"{name}.pth", tmp_path))
    notes = read_notes(path)
    config = Config.fromstring(notes["config"], ".py")
    model = build_model(config, trained.state_dict(), {"classes": notes["class_names"]})
    for parameter in model.parameters():
        parameter.data.zero_()
    model = qsd.load_packed(path, model)
    for key, found in outputs(model, expected).items():
        torch.testing.assert_close(found, expected[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: key + text)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", MODELS)
def test_a_record_of_a_conversion_becomes_a_page(name):
    path = FOLDER / f"{name}_conversion.json"
    record, written = report.Record.read(path), json.loads(path.read_text())
    assert record.energy.total_mj.merged == written["energy"]["total_mj"]["merged"]
    assert record.model.name in report.html(record)


# -- resuming ---------------------------------------------------------------------------------------------------------


class Resumed(Hook):
    """The optimizer's first moments by name, before the first step after resuming."""

    def before_train(self, runner):
        state = runner.optim_wrapper.optimizer.state
        named = runner.model.named_parameters()
        self.moments = {name: state[p]["exp_avg"].clone() for name, p in named if p in state}


def resume(path, scenes, folder, **options):
    content = torch.load(path, weights_only=False)
    config = Config.fromstring(content["meta"]["cfg"], ".py")
    for loader in ("train", "val", "test"):
        config[f"{loader}_dataloader"].dataset.data_root = str(scenes)
    if "ann_file" in config.val_evaluator:
        config.val_evaluator.ann_file = f"{scenes}/annotations/instances_validation.json"
    config.merge_from_dict({"train_cfg.val_interval": 100, **options})
    config.custom_hooks, config.resume, config.load_from = [dict(type="StepSizeHook")], True, str(path)
    config.work_dir, config.launcher = str(folder), "none"
    runner = build_runner(config, ("train",))
    seen = Resumed()
    runner.register_hook(seen)
    runner.train()
    return content, runner, seen.moments


def groups_of_version_0_1_0(content):
    """By learning rate and whether there is weight decay, in the order of their first parameter."""
    groups = {}
    for name, tensor in parameters(content["state_dict"]).items():
        head = name.startswith("decode_head")
        groups.setdefault((head, name.endswith("quantizer.step"), tensor.dim() > 1), []).append(name)
    return list(groups.values())


@pytest.mark.parametrize("name", MODELS)
def test_a_training_goes_on_with_each_parameter_s_own_optimizer_state(name, scenes, tmp_path):
    content, runner, found = resume(unpacked(f"{name}.pth", tmp_path), scenes, tmp_path / "run")
    expected = moments(groups_of_version_0_1_0(content), content["optimizer"])
    assert found.keys() == {present(key) for key in expected}
    for key, moment in expected.items():
        assert torch.equal(found[present(key)], moment), key
    assert runner.iter == 4
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    (last,) = (tmp_path / "run").glob("iter_4.pth")
    again = torch.load(last, weights_only=False)["optimizer"]
    names = [key for group in again["param_groups"] for key in group["param_names"]]
    assert sorted(names) == sorted(key for key, _ in runner.model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim_wrapper.optimizer": dict(_delete_=True, type="SGD", lr=0.1)}, "uses SGD"),
        ({"optim_wrapper.paramwise_cfg": dict(lr_mult={"backbone": 0.1})}, "parameter groups of this training"),
    ],
)
def test_what_cannot_be_restored_is_refused_with_one_line(options, message, scenes, tmp_path):
    with pytest.raises(QsdError, match=message):
        resume(unpacked("segmenter.pth", tmp_path), scenes, tmp_path / "run", **options)
