"""Spiking necks and heads: what stands in front of what, and that evaluation computes what training did."""

import math

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import qsd.mm
from qsd import QsdError
from qsd.layers import LinearChain, QuantConv2d, QuantLinear
from qsd.neurons import SpikeNeuron
from tests.helpers import CONFIGS
from tests.helpers.detection import narrow
from tests.helpers.mm import SMALL

DETECTORS = ("coco_qsd", "coco_cascade_qsd", "coco_retinanet_qsd")
ALL = (*DETECTORS, "ade20k_qsd")


def build(name, wide=False, **options):
    """A model with a small backbone; necks and heads are narrow unless their published width matters."""
    config = Config.fromfile(CONFIGS / f"{name}.py")
    config.merge_from_dict({**SMALL, **options})
    if not wide:
        narrow(config.model)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    model.init_weights()
    return model


def settings(model, **values):
    """Give every neck and head of a configuration other values of ``spike_cfg``."""
    options = {}

    def search(part, path):
        if isinstance(part, dict):
            if "spike_cfg" in part:
                options.update({f"{path}.spike_cfg.{key}": value for key, value in values.items()})
            for key, value in part.items():
                search(value, f"{path}.{key}")
        elif isinstance(part, list):
            for index, value in enumerate(part):
                search(value, f"{path}.{index}")

    search(Config.fromfile(CONFIGS / f"{model}.py").model.to_dict(), "model")
    return options


def parts(model):
    """Everything behind the backbone."""
    return {n: m for n, m in model.named_modules() if not n.startswith("backbone") and n}


@pytest.mark.parametrize("name", ALL)
def test_every_layer_behind_the_backbone_sees_counts_and_has_low_bit_weights(name):
    model = build(name).eval()
    seen = {}
    for key, module in parts(model).items():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            assert isinstance(module, QuantConv2d | QuantLinear), key
            assert module.quantizer.bits == 4, key
            module.register_forward_hook(lambda m, i, o, key=key: seen.setdefault(key, []).append(i[0]))
    neuron = next(m for m in parts(model).values() if isinstance(m, SpikeNeuron))
    run(model)
    layers = [k for k, m in parts(model).items() if isinstance(m, QuantConv2d | QuantLinear)]
    assert set(seen) == set(layers)
    for key, inputs in seen.items():
        for x in inputs:
            counts = x / neuron.amplitude
            assert torch.equal(counts, counts.round()), key
            assert counts.min() >= 0, key
            assert counts.max() <= neuron.time_steps, key
    assert not any(isinstance(m, nn.ReLU) for m in parts(model).values())


def run(model, images=None):
    """Neck and head outputs as one list; regions are fixed, so that nothing is selected by value."""
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3)) if images is None else images
    features = model.neck(model.backbone(images)) if model.with_neck else model.backbone(images)
    if hasattr(model, "decode_head"):
        return [model.decode_head(features)]
    if not hasattr(model, "roi_head"):
        return [x for level in model.bbox_head(features) for x in level]
    outputs = [x for level in model.rpn_head(features) for x in level]
    rois = torch.tensor([[0.0, 4, 4, 40, 50], [0, 10, 0, 90, 60], [1, 5, 5, 30, 30]])[: 2 if len(images) == 1 else 3]
    heads = model.roi_head
    stages = range(len(heads.bbox_head)) if isinstance(heads.bbox_head, nn.ModuleList) else [None]
    for stage in stages:
        pick = (lambda x: x) if stage is None else (lambda x, stage=stage: x[stage])
        levels = pick(heads.bbox_roi_extractor).num_inputs
        outputs += pick(heads.bbox_head)(pick(heads.bbox_roi_extractor)(features[:levels], rois))
        outputs.append(pick(heads.mask_head)(pick(heads.mask_roi_extractor)(features[:levels], rois)))
    return outputs


@pytest.mark.parametrize("name", ALL)
def test_evaluation_has_the_neurons_of_training(name):
    # The published neck clamps at 1 in evaluation and at 4 in training.
    model = build(name)
    outputs = []
    for mode in (True, False):
        model.train(mode)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.Dropout2d):
                module.eval()
        outputs.append(run(model))
    assert all(torch.equal(a, b) for a, b in zip(*outputs))


@pytest.mark.parametrize("name", ALL)
def test_an_image_does_not_depend_on_its_batch(name):
    model = build(name).double().eval()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pyramid = lambda x: model.neck(model.backbone(x))  # noqa: E731
    for both, alone in zip(pyramid(images), pyramid(images[:1])):
        torch.testing.assert_close(both[:1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_float_weights_and_relus_are_a_switch(name):
    model = build(name, **settings(name, weight_bits=0, time_steps=0))
    behind = parts(model).values()
    assert not any(isinstance(m, SpikeNeuron) for m in behind)
    assert all(m.quantizer is None for m in behind if isinstance(m, QuantConv2d | QuantLinear))
    assert any(isinstance(m, nn.ReLU) for m in behind)


@pytest.mark.parametrize("name", ALL)
def test_step_sizes_follow_the_weights_that_initialisation_sets(name):
    for key, module in parts(build(name)).items():
        if isinstance(module, QuantConv2d | QuantLinear):
            expected = 2 * module.weight.abs().mean() / module.quantizer.q_max**0.5
            torch.testing.assert_close(module.quantizer.step, expected.expand(len(module.quantizer.step)), msg=key)


@pytest.mark.parametrize("name", [*ALL, "digits_det", "digits_seg"])
def test_class_predictors_can_tell_classes_apart_from_the_start(name):
    """Step sizes grow slowly, and bound the weights: one spike on half of the inputs must do for 99 %."""
    model = build(name, wide=True)
    found = {n: m for n, m in parts(model).items() if n.endswith(("rpn_cls", "retina_cls", "fc_cls", "conv_seg"))}
    assert found
    for key, module in found.items():
        (layer,) = (m for m in module.modules() if isinstance(m, QuantConv2d | QuantLinear))
        (neuron,) = (m for m in module.modules() if isinstance(m, SpikeNeuron))
        largest = layer.quantizer.step.detach() * layer.quantizer.q_max
        inputs = layer.weight[0].numel() / 2
        assert (2 * largest * neuron.amplitude * inputs).min() > math.log(99), key


@pytest.mark.parametrize("name", ALL)
def test_strides_are_true(name):
    model = build(name)
    sizes = [64 // f.shape[2] for f in model.neck(model.backbone(torch.zeros(1, 3, 64, 64)))]
    if name == "ade20k_qsd":
        assert list(model.decode_head.feature_strides) == sizes
        return
    head = model.bbox_head if name == "coco_retinanet_qsd" else model.rpn_head
    assert [stride for stride, _ in head.prior_generator.strides] == sizes
    areas = [float(((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])).max()) ** 0.5 for b in head.prior_generator.base_anchors]
    # The usual ladder of anchor sizes, doubling although two levels have one stride.
    usual = {"coco_retinanet_qsd": [x * 2 ** (2 / 3) for x in (32, 64, 128, 256, 512)]}
    assert areas == pytest.approx(usual.get(name, [32, 64, 128, 256, 512]), rel=1e-4)
    if name != "coco_retinanet_qsd":
        extractors = model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor
        flat = [e for x in extractors for e in (x if isinstance(x, nn.ModuleList) else [x])]
        assert all(list(e.featmap_strides) == sizes[:4] for e in flat)


def test_the_enlargement_of_masks_is_a_transposed_convolution():
    layer = qsd.mm.layers.SpikeDeconv2d(3, 5, {"weight_bits": 0})
    conv = layer.conv.proj.conv
    counts = layer.conv.neuron(torch.rand(2, 3, 4, 6))
    # out[c, 2 i + a, 2 j + b] = sum_k weight[c, a, b, k] x[k, i, j]
    weight = conv.weight.view(5, 2, 2, 3).permute(3, 0, 1, 2)
    expected = nn.functional.conv_transpose2d(counts, weight, stride=2)
    bias = conv.bias.view(1, 5, 2, 2).repeat(1, 1, 4, 6)
    torch.testing.assert_close(nn.PixelShuffle(2)(conv(counts)), expected + bias)


def test_batch_norms_lie_in_chains_that_conversion_folds():
    model = build("ade20k_qsd")
    norms = [n for n, m in parts(model).items() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 14  # four laterals, four outputs, six scale convolutions
    assert all(isinstance(model.get_submodule(name.rpartition(".")[0]), LinearChain) for name in norms)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(type="SpikeConv2d", in_channels=3, out_channels=4, kernel_size=3, dilation=2), "dilation=2"),
        (dict(type="SpikeLinear", in_features=3, out_features=4, spike_cfg=dict(time_steps=300)), "time_steps=300"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(QsdError, match=message):
        MODELS.build(arguments)


def test_another_norm_or_enlargement_is_named():
    with pytest.raises(QsdError, match="GN"):
        build("coco_qsd", **{"model.neck.norm_cfg": dict(type="GN", num_groups=32)})
    with pytest.raises(QsdError, match="upsample_cfg"):
        build("coco_qsd", **{"model.roi_head.mask_head.upsample_cfg": dict(type="bilinear", scale_factor=2)})
