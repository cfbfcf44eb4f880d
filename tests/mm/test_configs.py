"""Every configuration is built at full size and takes a training step, shrunk, so that none can rot."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, init_default_scope
from torch import nn

import qsd.mm
from qsd.models.variants import family_of
from qsd.neurons import LsqNeuron
from tests.helpers import CONFIGS
from tests.helpers.mm import SMALL

ALL = sorted(CONFIGS.glob("*.py"))
# Backbone, neck and heads together, in millions: the backbones have 15.1, 31.3, 55.4 without their classifiers.
MILLIONS = {
    "ade20k_e_spikeformer": 22.7,
    "ade20k_qsd": 18.9,
    "ade20k_qsd_31m": 35.1,
    "ade20k_qsd_55m": 59.1,
    "coco_cascade_qsd": 67.9,
    "coco_e_spikeformer": 38.8,
    "coco_qsd": 34.9,
    "coco_qsd_31m": 75.8,
    "coco_qsd_55m": 134.3,
    "coco_retinanet_qsd": 24.6,
    "digits_det": 1.8,
    "digits_seg": 1.0,
}


def read(path):
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    return config


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_config_is_built_at_full_size(path):
    config = read(path)
    with torch.device("meta"):
        model = MODELS.build(config.model)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLIONS[path.stem], abs=0.05)
    backbone = config.model.backbone.model
    variant = family_of(backbone).sizes[backbone]
    assert tuple(config.model.neck.in_channels) == tuple(variant["embed_dims"])
    converting = ["ConvertToSpikeDrivenHook"] if path.stem.startswith("digits") else []
    assert [hook["type"] for hook in config.custom_hooks] == ["StepSizeHook", "SpikeStatisticsHook", *converting]
    assert all(HOOKS.build(hook) for hook in config.custom_hooks)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_config_takes_a_training_step(path):
    config = read(path)
    config.merge_from_dict(SMALL)
    for part in ("neck", "rpn_head", "bbox_head", "roi_head", "decode_head", "train_cfg"):
        _narrow(config.model.get(part) or {})
    if config.default_scope == "mmseg":
        config.model.data_preprocessor.size = (64, 64)  # to which images are filled up
    model = MODELS.build(config.model)
    model.init_weights()
    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = _detection if config.default_scope == "mmdet" else _segmentation
    data = model.data_preprocessor(inputs(), training=True)
    losses = model(**data, mode="loss")
    total, _ = model.parse_losses(losses)
    assert torch.isfinite(total)
    optimizer.update_params(total)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert "backbone.model.stem.downsample.proj.conv.weight" not in still
    # Behind the backbone all learns, but for levels whose anchors leave so small an image; in it, a layer scale of 1e-6
    # hides the rest.
    behind = [name for name in before if not name.startswith("backbone")]
    assert len([name for name in behind if name in still]) < 0.2 * len(behind), still


def _narrow(part):
    """Few features and few proposals behind the backbone: every number of 128 or more becomes 32."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        if isinstance(value, tuple):
            part[key] = value = list(value)
        if isinstance(value, dict | list):
            _narrow(value)
        elif isinstance(value, int) and value >= 128 and key != "num_classes":
            part[key] = 32


def _picture():
    return torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)


def _detection():
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    samples = []
    for _ in range(2):
        boxes = torch.tensor([[4.0, 6, 40, 50], [30, 10, 60, 44]])
        masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
        masks[0, 10:40, 8:36] = masks[1, 14:40, 34:58] = 1
        sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=torch.tensor([1, 7]), masks=BitmapMasks(masks.numpy(), 64, 64)
        )
        samples.append(sample)
    return {"inputs": [_picture(), _picture()], "data_samples": samples}


def _segmentation():
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 10, (1, 64, 64)))
        samples.append(sample)
    return {"inputs": [_picture(), _picture()], "data_samples": samples}


def test_the_published_recipes():
    # The released configurations of the published code; see each file for what is ours.
    coco, ade = read(CONFIGS / "coco_qsd.py"), read(CONFIGS / "ade20k_qsd.py")
    optimizer = coco.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 2e-4, 0.05)
    assert (coco.train_cfg.max_epochs, coco.train_dataloader.batch_size) == (15, 8)
    assert (coco.param_scheduler[0].end, coco.param_scheduler[1].milestones) == (1000, [8, 11])
    wide = read(CONFIGS / "coco_qsd_31m.py")
    assert (wide.train_cfg.max_epochs, wide.train_dataloader.batch_size) == (12, 1)
    assert (wide.model.neck.out_channels, wide.model.roi_head.bbox_head.fc_out_channels) == (384, 1536)
    assert read(CONFIGS / "coco_retinanet_qsd.py").train_cfg.max_epochs == 36
    optimizer = ade.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-3, 0.005)
    assert (ade.train_cfg.max_iters, ade.train_dataloader.batch_size) == (160000, 16)
    assert (ade.param_scheduler[0].end, ade.param_scheduler[1].power) == (1500, 1.0)


def test_the_published_recipe_of_e_spikeformer_and_its_true_strides():
    coco, ade = read(CONFIGS / "coco_e_spikeformer.py"), read(CONFIGS / "ade20k_e_spikeformer.py")
    assert (coco.train_cfg.max_epochs, coco.train_dataloader.batch_size) == (12, 4)
    assert (coco.model.neck.out_channels, coco.model.roi_head.bbox_head.fc_out_channels) == (256, 1024)
    assert coco.model.rpn_head.anchor_generator.strides == [4, 8, 16, 16, 32]
    assert ade.model.decode_head.feature_strides == [4, 8, 16, 16]
    assert (ade.train_cfg.max_iters, ade.train_dataloader.batch_size) == (160000, 16)


def test_parameter_groups():
    config = read(CONFIGS / "ade20k_qsd.py")
    config.merge_from_dict(SMALL)
    model = MODELS.build(config.model)
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(rates) == sum(1 for _ in model.parameters())
    for name, parameter in model.named_parameters():
        head = 2 if name.startswith("decode_head") else 1
        step = 0.01 if name.endswith("quantizer.step") else 1
        decay = 0.005 if parameter.dim() > 1 else 0.0
        assert rates[id(parameter)] == (pytest.approx(1e-3 * head * step), decay), name


def test_learned_steps_of_neurons_learn_at_the_rate_of_step_sizes():
    model = nn.ModuleDict({"backbone": nn.Sequential(LsqNeuron(4), nn.Linear(2, 2))})
    wrapper = dict(type="OptimWrapper", constructor="StepSizeOptimWrapperConstructor",
                   optimizer=dict(type="AdamW", lr=1e-3))  # fmt: skip
    groups = build_optim_wrapper(model, wrapper).optimizer.param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model["backbone"][0].step)] == pytest.approx(1e-5)
    assert rates[id(model["backbone"][1].weight)] == 1e-3


def test_unknown_group_options_are_named():
    with pytest.raises(qsd.QsdError, match="norm_decay_mult"):
        qsd.mm.StepSizeOptimWrapperConstructor(dict(optimizer=dict(type="SGD", lr=1.0)), dict(norm_decay_mult=0.0))
