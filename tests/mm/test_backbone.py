"""The package's networks as backbones of OpenMMLab."""

import pytest
import timm
import torch
from mmengine.registry import MODELS
from torch import nn

import qsd.mm
from qsd import QsdError
from qsd.neurons import SpikeNeuron

SIZES = {"embed_dims": (8, 16, 24, 32), "depth": 4, "num_heads": 4}


def build(**arguments):
    return MODELS.build(dict(type="SpikeTransformerBackbone", model="qsd_tiny", model_args=SIZES, **arguments))


@pytest.mark.parametrize("framework", ["mmdet", "mmseg"])
def test_mmdet_and_mmseg_find_it(framework):
    registry = __import__(f"{framework}.registry", fromlist=["MODELS"]).MODELS
    backbone = registry.build(dict(type="SpikeTransformerBackbone", model="qsd_tiny", model_args=SIZES))
    assert backbone.strides == (4, 8, 16, 16)
    assert backbone.channels == (8, 16, 24, 32)


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2), (3,)])
def test_features_equal_those_of_timm(out_indices):
    backbone = build(out_indices=out_indices).eval()
    reference = timm.create_model("qsd_tiny", features_only=True, out_indices=out_indices, **SIZES).eval()
    reference.model.load_state_dict(backbone.model.state_dict())
    images = torch.randn(2, 3, 64, 80)
    features = backbone(images)
    expected = reference(images)
    assert len(features) == len(expected) == len(out_indices)
    assert all(torch.equal(a, b) for a, b in zip(features, expected))


def test_stages_behind_the_last_one_are_left_out():
    whole, part = build(), build(out_indices=(0, 1))
    assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in whole.parameters()) / 2


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (0, 1)])
def test_weights_come_from_a_checkpoint_of_a_classifier(tmp_path, out_indices):
    classifier = timm.create_model("qsd_tiny", num_classes=7, **SIZES)
    torch.save({"state_dict": {f"model.{k}": v for k, v in classifier.state_dict().items()}}, tmp_path / "best.ckpt")
    backbone = build(out_indices=out_indices, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "best.ckpt")))
    backbone.init_weights()
    state = classifier.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in backbone.model.state_dict().items())


def test_weights_come_from_a_checkpoint_of_the_published_code(tmp_path, reference_state):
    torch.save({"model": reference_state}, tmp_path / "reference.pth")
    sizes = {"embed_dims": (8, 16, 24, 32), "depth": 4, "num_heads": 4}
    backbone = MODELS.build(
        dict(
            type="SpikeTransformerBackbone",
            model="qsd_15m",
            model_args=sizes,
            init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "reference.pth")),
        )
    )
    backbone.init_weights()
    expected = timm.create_model("qsd_15m", num_classes=0, **sizes)
    qsd.load_reference_weights(expected, reference_state)
    known = expected.state_dict()
    assert all(torch.equal(v, known[n]) for n, v in backbone.model.state_dict().items())


def test_frozen_stages_and_norms_do_not_learn():
    backbone = build(frozen_stages=2, norm_eval=True).train()
    model = backbone.model
    frozen = [model.stem, model.stages[0], model.stages[1]]
    assert not any(p.requires_grad for module in frozen for p in module.parameters())
    assert all(p.requires_grad for module in model.stages[2:] for p in module.parameters())
    before = {name: value.clone() for name, value in backbone.state_dict().items() if "running" in name}
    backbone(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(backbone.state_dict()[name], value) for name, value in before.items())


def test_the_stem_of_a_csdformer_can_be_frozen():
    sizes = {"embed_dims": 16, "depth": 2, "num_heads": 2}
    backbone = MODELS.build(
        dict(
            type="SpikeTransformerBackbone",
            model="csdformer_8_384",
            model_args=sizes,
            out_indices=(0, 1),
            frozen_stages=1,
        )
    ).train()
    model = backbone.model
    frozen = [*model.stem.modules(), *model.blocks[0].modules()]
    assert not any(module.training for module in frozen)
    assert not any(p.requires_grad for module in frozen for p in module.parameters())
    assert all(p.requires_grad for p in model.blocks[1].parameters())


def test_statistics_that_nobody_learned_are_warned_of(caplog):
    build(norm_eval=True).init_weights()
    assert "norm_eval=True without pretrained weights" in caplog.text


def test_norms_learn_unless_told_otherwise():
    backbone = build().train()
    assert all(m.training for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))


def test_recomputation_leaves_the_gradient():
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    state = build().state_dict()
    for recompute in (False, True):
        backbone = build(grad_checkpointing=recompute).train()
        backbone.load_state_dict(state)
        sum(f.square().sum() for f in backbone(images)).backward()
        gradients.append({n: p.grad for n, p in backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_training_and_evaluation_have_the_same_neurons():
    backbone = build()
    neurons = {
        name: (m.time_steps, m.threshold, m.amplitude)
        for name, m in backbone.named_modules()
        if isinstance(m, SpikeNeuron)
    }
    assert set(neurons.values()) >= {(4, 0.25, 0.25)}
    outputs = []
    for mode in (True, False):
        backbone.train(mode)
        for norm in backbone.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
        outputs.append(backbone(torch.ones(1, 3, 64, 64)))
    assert all(torch.equal(a, b) for a, b in zip(*outputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_indices": (0, 4)}, "stages 0 to 3"),
        ({"frozen_stages": 5}, "frozen_stages=5"),
        ({"init_cfg": dict(type="Kaiming")}, "Pretrained"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(QsdError, match=message):
        build(**arguments)
