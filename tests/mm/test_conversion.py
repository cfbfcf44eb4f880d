"""Whole detectors and segmenters on binary spikes: the same counts, classes and boxes, in spikes alone."""

import copy
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn

import qsd.mm
from qsd import QsdError
from qsd.mm.spiking import DENSE, ImageSubset, compare_model, predict, total_energy, write_model
from qsd.mm.spiking.comparison import contents
from qsd.mm.spiking.measuring import DEFAULTS
from qsd.neurons import SpikeNeuron
from qsd.packing import load_packed
from qsd.report import FILES, ConversionOptions, Origin, Record
from tests.helpers import CONFIGS, ROOT, sample
from tests.helpers.mm import SMALL

ALL = ("coco_qsd", "coco_cascade_qsd", "coco_retinanet_qsd", "ade20k_qsd")
SEGMENTS = {
    "coco_qsd": [DENSE, "roi_head.bbox_head", "roi_head.mask_head"],
    "coco_cascade_qsd": [DENSE, *(f"roi_head.{kind}_head.{i}" for kind in ("bbox", "mask") for i in range(3))],
    "coco_retinanet_qsd": [DENSE],
    "ade20k_qsd": [DENSE],
}


def shrunk(name):
    """A configuration whose heads take a few milliseconds, and whose untrained scores are enough for boxes."""
    config = Config.fromfile(CONFIGS / f"{name}.py")
    config.merge_from_dict(SMALL)
    model, width = config.model, 16
    # At T = 4 the parts of a current are exact: regions whose scores tie, as many do in an untrained network, tie in
    # steps as well.
    model.backbone.model_args.update(time_steps=4, depth=2)
    model.neck.out_channels = width
    heads = [model.get("bbox_head"), model.get("rpn_head"), model.get("decode_head")]
    if "roi_head" in model:
        roi = model.roi_head
        roi.bbox_roi_extractor.out_channels = roi.mask_roi_extractor.out_channels = width
        boxes = roi.bbox_head if isinstance(roi.bbox_head, list) else [roi.bbox_head]
        roi.mask_head.update(in_channels=width, conv_out_channels=width, num_convs=1, num_classes=10)
        for head in boxes:
            head.update(in_channels=width, fc_out_channels=32, num_classes=10)
        model.test_cfg.rpn.max_per_img = 12
        model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=4)
    if "retinanet" in name:
        model.bbox_head.update(stacked_convs=1, num_classes=10)
        model.test_cfg.update(score_thr=0.0, nms_pre=50, max_per_img=4)
    for head in heads:
        if head is not None:
            head.update(in_channels=[width] * 4 if head is heads[2] else width)
            head.update({"channels": width} if head is heads[2] else {"feat_channels": width})
    return config


def build(config, images):
    """A model in evaluation whose neurons fire: norms know the images' statistics."""
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
        if isinstance(module, nn.Conv2d | nn.Linear) and getattr(module, "bias", None) is not None:
            nn.init.uniform_(module.bias, 0.0, 0.6)  # predictors' inputs too must reach a threshold of 1
    model.train()
    with torch.no_grad():
        for _ in range(2):
            features = model.neck(model.backbone(images))
            if "decode_head" in config.model:
                model.decode_head(features)
    return model.eval()


@pytest.fixture(scope="module")
def batches(scenes):
    """Two scenes of digits, as the detector's data loader gives them."""
    config = Config.fromfile(CONFIGS / "digits_det.py")
    init_default_scope("mmdet")
    dataset = {**config.val_dataloader.dataset, "data_root": str(scenes)}
    return list(ImageSubset(DATASETS.build(dataset), 2))


@pytest.fixture(scope="module")
def trained(batches):
    """Every kind of model, in float64, with its scenes."""
    models = {}

    def get(name):
        if name not in models:
            torch.manual_seed(1)
            config = shrunk(name)
            if "decode_head" in config.model:
                config.model.data_preprocessor.size = (160, 160)
            images = torch.stack([batch["inputs"][0] for batch in batches]).float()
            models[name] = build(config, (images - 110) / 60).double()
        model = models[name]
        if not hasattr(model, "decode_head"):
            return model, batches
        return model, [_segmenter_s(batch) for batch in batches]

    return get


def _segmenter_s(batch):
    from mmseg.structures import SegDataSample

    meta = {"ori_shape": (160, 160), "img_shape": (160, 160), "pad_shape": (160, 160)}
    return {"inputs": batch["inputs"], "data_samples": [SegDataSample(metainfo=meta)]}


@pytest.fixture(scope="module")
def converted(trained):
    models = {}

    def get(name):
        if name not in models:
            models[name] = qsd.mm.convert_model(trained(name)[0])
        return models[name]

    return get


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("way", ["count", "simulate"])
def test_counts_classes_and_boxes_are_those_of_the_trained_model(name, way, trained, converted):
    (model, scenes), spiking = trained(name), converted(name)
    assert list(spiking.segments) == SEGMENTS[name]
    comparison = compare_model(model, spiking, scenes, way)
    assert (comparison.dtype, comparison.images) == ("float64", 2)
    assert comparison.changed_images == 0
    assert comparison.equal_classes == 2
    assert comparison.largest_difference <= 1e-9


@pytest.mark.parametrize("name", sample(["coco_qsd"], ALL))
def test_digits_of_counts_give_the_same_counts_classes_and_boxes_in_fewer_steps(name, trained, converted):
    (model, scenes), spiking = trained(name), qsd.mm.convert_model(trained(name)[0], code="binary")
    comparison = compare_model(model, spiking, scenes[:1], "simulate")
    assert (comparison.changed_images, comparison.equal_classes) == (0, 1)
    assert comparison.largest_difference <= 1e-9
    assert spiking.latency() < converted(name).latency()
    energy = total_energy(spiking.energy(scenes[:1]))
    assert [cost.steps for cost in energy.codes] == [4, 3]
    assert energy.codes[1].energy_mj == pytest.approx(energy.total)
    with pytest.raises(QsdError, match="in the binary code the first digit of a count needs all 3 steps"):
        spiking.simulate(scenes[0], delay=1)


@pytest.mark.parametrize("name", ALL)
def test_predictions_hold_something_to_compare(name, trained, converted):
    (model, scenes), spiking = trained(name), converted(name)
    for batch in scenes:
        (expected,), (found,) = predict(model, batch), spiking.simulate(batch).samples
        if name == "ade20k_qsd":
            assert len(expected.pred_sem_seg.data.unique()) > 1
            torch.testing.assert_close(found.seg_logits.data, expected.seg_logits.data, rtol=0, atol=1e-9)
            continue
        assert len(expected.pred_instances) == 4
        for key in ("bboxes", "scores"):
            torch.testing.assert_close(found.pred_instances[key], expected.pred_instances[key], rtol=0, atol=1e-9)
        assert torch.equal(found.pred_instances.labels, expected.pred_instances.labels)
        if "masks" in expected.pred_instances:
            assert expected.pred_instances.masks.any()


@pytest.mark.parametrize("name", ALL)
def test_every_synaptic_layer_but_the_stem_sees_binary_spikes(name, trained, converted):
    (model, scenes), spiking = trained(name), converted(name)
    audit = spiking.audit(scenes)
    audit.check()
    assert [o.name for o in audit.operations if o.stem] == ["backbone.model.stem.downsample.proj"]
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    seen = {o.name for o in audit.operations}
    # every layer with weights was looked at: by its own name, or as part of a chain that is one convolution now
    assert all(any(layer == s or layer.startswith(f"{s}.") for s in seen) for layer in layers)
    assert not any(o.operation == "other" for o in audit.operations)


@pytest.mark.parametrize("name", sample(["coco_retinanet_qsd"], ALL))
def test_calls_from_several_threads_do_not_touch_each_other_and_pickles_work(name, trained):
    (model, scenes) = trained(name)
    spiking = qsd.mm.convert_model(model)
    uses = {
        "count": lambda converted, batch: contents(converted.predict(batch)[0]),
        "early": lambda converted, batch: contents(converted.simulate(batch, delay=0).samples[0]),
    }
    jobs = [(use, i) for i in range(len(scenes)) for use in uses]
    expected = {job: uses[job[0]](spiking, scenes[job[1]]) for job in jobs}
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda job: (job, uses[job[0]](spiking, scenes[job[1]])), jobs + jobs[::-1])
    other = pickle.loads(pickle.dumps(spiking))
    with other.running(lambda *_: None):  # in the copy alone
        copies = [(("count", 0), uses["count"](spiking, scenes[0]))]
    copies += [(("count", 0), uses["count"](x, scenes[0])) for x in (other, copy.deepcopy(spiking))]
    for job, result in [*found, *copies]:
        assert result.keys() == expected[job].keys()
        assert all(torch.equal(value, expected[job][key]) for key, value in result.items()), job


def test_without_merging_the_audit_names_inner_layers(trained):
    model, scenes = trained("ade20k_qsd")
    with pytest.raises(QsdError, match="merge='all'"):
        qsd.mm.convert_model(model, merge=False).audit(scenes[:1]).check()


def test_a_difference_is_found(trained):
    model, scenes = trained("coco_qsd")
    spiking = qsd.mm.convert_model(model)
    spiking.segments["roi_head.bbox_head"].network.roi_head.bbox_head.fc_cls.linear.bias[3] += 0.5
    comparison = compare_model(model, spiking, scenes)
    assert comparison.largest_difference > 1e-3
    spiking.segments[DENSE].network.neck.fpn_convs[0].conv.proj.convolutions["conv"].bias += 0.5
    assert compare_model(model, spiking, scenes).changed_images == 2


def test_a_copy_stands_alone_and_takes_another_number_format(trained, converted):
    (_, scenes), spiking = trained("coco_qsd"), converted("coco_qsd")
    other = copy.deepcopy(spiking).float()
    (before,) = spiking.predict(scenes[0])
    (narrow,) = other.predict(scenes[0])
    assert (before.pred_instances.scores.dtype, narrow.pred_instances.scores.dtype) == (torch.float64, torch.float32)
    other.segments["roi_head.bbox_head"].network.roi_head.bbox_head.fc_cls.linear.bias[3] += 0.5
    assert not torch.equal(other.predict(scenes[0])[0].pred_instances.scores, narrow.pred_instances.scores)
    assert torch.equal(spiking.predict(scenes[0])[0].pred_instances.scores, before.pred_instances.scores)


def test_a_head_that_levels_share_is_counted_and_priced_by_level(trained, converted):
    (model, scenes), spiking = trained("coco_qsd"), converted("coco_qsd")
    counts = {}
    with spiking.counting(lambda name, count: counts.__setitem__(name, counts.get(name, 0) + count.sum())):
        for batch in scenes:
            spiking.predict(batch)
    levels = [counts[f"rpn_head.rpn_cls.neuron@{level}"] for level in range(5)]
    assert all(level > 0 for level in levels)
    energies = spiking.energy(scenes)
    layers = {layer.name: layer for layer in total_energy(energies).layers}
    anchors = model.rpn_head.num_base_priors
    for level, spikes in enumerate(levels):  # 1x1 kernels: a spike is added to each anchor's score
        added = layers[f"rpn_head.rpn_cls.proj@{level}"].additions["merged"]
        assert added == pytest.approx(float(spikes) * anchors / len(scenes))
    # per image, not per region: 11 classes' scores for each spike of twelve regions
    spikes = counts["roi_head.bbox_head.fc_cls.neuron"]
    added = layers["roi_head.bbox_head.fc_cls.linear"].additions["merged"]
    assert added == pytest.approx(float(spikes) * 11 / len(scenes))
    assert total_energy(energies).total == pytest.approx(sum(energy.total for energy in energies.values()))


def test_latency_adds_up_over_the_segments(converted):
    detector, cascade = converted("coco_qsd"), converted("coco_cascade_qsd")
    steps = {name: network.latency() for name, network in detector.segments.items()}
    assert steps["roi_head.bbox_head"] == 4 + 3 * 3  # two hidden layers and a predictor, each behind a delay of 3
    assert steps["roi_head.mask_head"] == 4 + 3 * 3  # a convolution, the enlargement, the predictor
    # neck and RPN stand four neurons in a row behind the backbone
    alone = qsd.to_spike_driven(Deepest(), example=torch.randn(1, 3, 64, 64))
    assert steps[DENSE] == alone.latency() + 4 * 3
    assert detector.latency() == sum(steps.values())
    # three box heads in a row, then all mask heads at once
    dense = cascade.segments[DENSE].latency()
    assert cascade.latency() == dense + 3 * (4 + 3 * 3) + 4 + 3 * 3


class Deepest(nn.Module):
    """A backbone's last features."""

    def __init__(self):
        super().__init__()
        self.backbone = MODELS.build(shrunk("coco_qsd").model.backbone)

    def forward(self, x):
        return self.backbone(x)[-1]


def test_a_simulation_records_what_is_asked_for(trained, converted):
    (_, scenes), spiking = trained("coco_qsd"), converted("coco_qsd")
    simulation = spiking.simulate(scenes[0], record=["rpn_head.rpn_cls.neuron@4", "roi_head.mask_head.*"])
    assert list(simulation.traces) == SEGMENTS["coco_qsd"]
    (dense,), (boxes,), (masks,) = simulation.traces.values()
    assert list(dense.spikes) == ["rpn_head.rpn_cls.neuron@4"]
    assert not boxes.spikes
    assert all(spikes.shape[:2] == (4, 4) for spikes in masks.spikes.values())  # T, and as many regions as boxes
    with pytest.raises(QsdError, match="record='rpn_neuron' names no neuron"):
        spiking.simulate(scenes[0], record="rpn_neuron")


def test_the_example_of_the_documentation_runs(trained):
    model, scenes = trained("coco_qsd")
    names = {"model": model, "batch": scenes[0], "batches": scenes}
    (block,) = re.findall(r"```python\n(from qsd\.mm.*?)```", (ROOT / "docs/detection.md").read_text(), re.DOTALL)
    exec(block, names)
    (sample,), (stepped,) = names["samples"], names["simulation"].samples
    torch.testing.assert_close(sample.pred_instances.bboxes, stepped.pred_instances.bboxes, rtol=0, atol=1e-9)
    assert list(names["energy"]) == SEGMENTS["coco_qsd"]


def test_a_csdformer_is_a_backbone_too(batches):
    config = shrunk("coco_retinanet_qsd")
    sizes = {"embed_dims": 16, "depth": 4, "num_heads": 2}
    config.model.backbone = dict(type="SpikeTransformerBackbone", model="csdformer_4_256", model_args=sizes)
    config.model.neck.in_channels = [16] * 4
    torch.manual_seed(2)
    images = torch.stack([batch["inputs"][0][:, :64, :64] for batch in batches]).float()
    model = build(config, (images - 110) / 60).double()
    spiking = qsd.mm.convert_model(model)
    small = [{**batch, "inputs": [batch["inputs"][0][:, :64, :64]]} for batch in batches]
    for way in ("count", "simulate"):
        comparison = compare_model(model, spiking, small, way)
        assert (comparison.changed_images, comparison.equal_classes) == (0, 2)
        assert comparison.largest_difference <= 1e-9
    spiking.audit(small).check()


def test_short_delays_step_and_refuse_the_count_domain(trained):
    model, scenes = trained("coco_retinanet_qsd")
    spiking = qsd.mm.convert_model(model, delay=0)
    assert spiking.latency() < qsd.mm.convert_model(model).latency()
    with pytest.raises(QsdError, match="call simulate"):
        spiking.predict(scenes[0])
    changed = compare_model(model, spiking, scenes[:1], "simulate")  # which asks for the delay T - 1
    assert changed.changed_images == 0
    (early,), (late,) = spiking.simulate(scenes[0]).samples, spiking.simulate(scenes[0], delay=3).samples
    assert not torch.equal(early.pred_instances.scores, late.pred_instances.scores)


def test_sliding_windows_run_a_segment_several_times(trained, converted):
    model, scenes = trained("ade20k_qsd")
    model = copy.deepcopy(model)
    model.test_cfg = Config({"mode": "slide", "crop_size": (96, 96), "stride": (64, 64)})
    spiking = qsd.mm.convert_model(model)
    comparison = compare_model(model, spiking, scenes[:1])
    assert comparison.changed_images == 0
    assert comparison.largest_difference <= 1e-9
    assert len(spiking.simulate(scenes[0]).traces[DENSE]) == 4


def test_in_float32_the_scenes_that_differ_are_counted(trained):
    model, scenes = trained("coco_qsd")
    model = copy.deepcopy(model).float()
    comparison = compare_model(model, qsd.mm.convert_model(model), scenes)
    assert comparison.dtype == "float32"
    assert 0 <= comparison.changed_images <= 2
    if comparison.farthest_first_difference is not None:
        assert comparison.farthest_first_difference < 1e-4


FLOAT_NECK = dict(type="FPN", in_channels=[8, 8, 16, 16], out_channels=16, num_outs=5)
RELUS = dict(spike_cfg=dict(time_steps=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(neck=FLOAT_NECK), r"neck\.lateral_convs\.0\.conv is a Conv2d, without spikes"),
        (dict(neck=RELUS), r"neck\.lateral_convs\.0\.conv\.neuron is the ReLU of a float twin"),
        (dict(roi_head=dict(mask_head=RELUS)), r"roi_head\.mask_head\.convs\.0\.neuron is the ReLU"),
        (dict(backbone=dict(model_args=dict(time_steps=0))), r"layer backbone\.model\.\S+ is the ReLU"),
        (dict(roi_head=dict(bbox_head=dict(spike_cfg=dict(time_steps=2)))), "one number of time steps"),
    ],
)
def test_a_layer_that_does_not_spike_is_named(change, message):
    config = shrunk("coco_qsd")
    init_default_scope("mmdet")
    if change.get("neck") is FLOAT_NECK:
        config.model.neck = FLOAT_NECK
    else:
        config.merge_from_dict({"model": change})
    with pytest.raises(QsdError, match=message):
        qsd.mm.convert_model(MODELS.build(config.model))


def test_a_layer_outside_all_segments_is_named(trained):
    model = copy.deepcopy(trained("coco_qsd")[0])
    model.roi_head.shared_head = nn.Conv2d(16, 16, 1)
    with pytest.raises(QsdError, match=r"layer roi_head\.shared_head lies outside"):
        qsd.mm.convert_model(model)


def test_the_record_and_its_page_say_what_was_measured(trained, tmp_path):
    model, scenes = trained("coco_qsd")
    model = copy.deepcopy(model).float()
    dataset = [{key: value[0] for key, value in batch.items()} for batch in scenes]
    record = write_model(
        model,
        ImageSubset(dataset),
        tmp_path,
        ConversionOptions(**{**DEFAULTS, "step_images": 1}),
        Origin("Digits"),
        "config text",
        progress=False,
    )
    packed = FILES[0]
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    assert Record.read(tmp_path / "conversion.json") == record
    record = json.loads((tmp_path / "conversion.json").read_text())
    exact = [c for c in record["comparison"] if c["dtype"] == "float64"]
    assert [(c["way"], c["images"], c["changed_images"]) for c in exact] == [("count", 2, 0), ("simulate", 1, 0)]
    assert record["audit"]["spike_driven"]
    assert [s["inputs"] for s in record["segments"]] == [1, 12, 4]  # an image, its regions, its boxes
    spent = sum(s["energy_mj"]["merged"] for s in record["segments"])
    assert record["energy"]["total_mj"]["merged"] == pytest.approx(spent)
    assert record["latency"]["steps"] == sum(s["latency"] for s in record["segments"])
    page = (tmp_path / "report.html").read_text()
    for words in ("Digits in binary spikes", "Lossless.", "roi_head.mask_head", "rpn_head.rpn_conv.0.neuron@4"):
        assert words in page
    # packed weights make the same model again
    again = MODELS.build(shrunk("coco_qsd").model)
    load_packed(tmp_path / packed, again).eval()
    (first,), (second,) = predict(model, scenes[0]), predict(again, scenes[0])
    assert torch.equal(first.pred_instances.bboxes, second.pred_instances.bboxes)
    neurons = {n for n, m in model.named_modules() if isinstance(m, SpikeNeuron)}
    counted = {n["name"].partition("@")[0] for n in record["neurons"]}
    assert neurons - counted == {"backbone.model.head_neuron"}, "which stands in front of a classifier, and has none"
