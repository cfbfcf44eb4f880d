"""What is said of membranes and counts, against numpy on the tensors themselves and against theory."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from qsd import QsdError
from qsd.distillation import Teacher, attention_distances
from qsd.information import BINS_PER_UNIT, HIGHEST, LOWEST, SignalMeter, measure_information

SMALL = {"embed_dims": (8, 8, 16, 8), "num_heads": 2, "depth": 4, "strides": (1, 2, 2, 2, 1), "layer_scale": 0.5}


def signal(membrane, time_steps, heads=2):
    """Feed a neuron's counts of this membrane, in two batches."""
    meter = SignalMeter(time_steps, heads)
    for part in membrane.tensor_split(2):
        meter.update(part, torch.floor(time_steps * part + 0.5).clamp(0, time_steps))
    return meter.signal("attn", "query")


def entropy(shares):
    return -sum(p * math.log2(p) for p in shares if p > 0)


def test_moments_entropy_and_rate_are_numpy_s():
    membrane = torch.randn(40, 4, 6, 5, dtype=torch.float64) * 0.7 + 0.2
    found = signal(membrane, 4)
    x = membrane.numpy().ravel()
    n = np.clip(np.floor(4 * x + 0.5), 0, 4)
    for distribution, values in ((found.membrane, x), (found.counts, n)):
        assert distribution.mean == pytest.approx(values.mean())
        assert distribution.deviation == pytest.approx(values.std())
        z = (values - values.mean()) / values.std()
        assert distribution.bimodality == pytest.approx((np.mean(z**3) ** 2 + 1) / np.mean(z**4))
    assert found.counts.histogram == np.bincount(n.astype(int), minlength=5).tolist()
    edges = np.linspace(LOWEST, HIGHEST, (HIGHEST - LOWEST) * BINS_PER_UNIT + 1)
    inside = np.clip(x, LOWEST + 1e-9, HIGHEST - 1e-9)
    assert found.membrane.histogram == np.histogram(inside, edges)[0].tolist()
    assert found.firing_rate == pytest.approx(n.mean() / 4)
    assert found.entropy == pytest.approx(entropy(np.bincount(n.astype(int)) / n.size))
    assert found.max_entropy == pytest.approx(math.log2(5))
    within = sum(np.mean(n == k) * x[n == k].var() for k in range(5))
    assert found.kept_variance == pytest.approx(1 - within / x.var())
    bins = np.digitize(inside, edges)
    joint = np.unique(np.stack([bins, n]), axis=1, return_counts=True)[1] / n.size
    of_bins = entropy(np.bincount(bins) / n.size)
    assert found.kept_information == pytest.approx((of_bins + found.entropy - entropy(joint)) / of_bins)


@pytest.mark.parametrize(("time_steps", "mass"), [(1, [0.5] * 2), (4, [0.125, 0.25, 0.25, 0.25, 0.125])])
def test_a_uniform_membrane_has_the_entropy_of_its_intervals(time_steps, mass):
    # From 0 to 1, thresholds at (k - 1/2) / T: inner counts have 1/T of the membrane, outer ones half of it.
    membrane = (torch.arange(64 * 100, dtype=torch.float64) + 0.5).view(100, 4, 4, 4) / 6400
    found = signal(membrane, time_steps)
    assert found.entropy == pytest.approx(entropy(mass))
    assert found.membrane.bimodality == pytest.approx(5 / 9, rel=1e-3)
    # thresholds lie on the edges of the bins: the count follows from the bin, and all of its entropy is shared
    assert found.kept_information == pytest.approx(entropy(mass) / math.log2(BINS_PER_UNIT))
    assert found.kept_variance == pytest.approx(1 - 12 * sum(p * p**2 / 12 for p in mass), rel=1e-6)


def test_more_levels_keep_more():
    membrane = torch.randn(50, 4, 8, 8) * 0.5 + 0.5
    kept = [signal(membrane, steps) for steps in (1, 2, 4, 8)]
    for quantity in ("entropy", "kept_information", "kept_variance"):
        values = [getattr(s, quantity) for s in kept]
        assert values == sorted(values)
        assert values[0] < values[-1]


def test_a_two_point_distribution_is_bimodal_and_a_normal_one_is_not():
    assert signal(torch.tensor([0.0, 1.0]).repeat(800).view(100, 4, 2, 2), 1).counts.bimodality == pytest.approx(1)
    assert signal(torch.randn(400, 4, 8, 8), 1).membrane.bimodality == pytest.approx(1 / 3, rel=0.02)


def test_silence_has_no_information_and_is_said_so():
    membrane = torch.full((3, 4, 2, 2), -1.0)
    membrane[0, 2:] = 1.0  # one head of one image fires
    found = signal(membrane, 4)
    assert found.silent_heads == pytest.approx(5 / 6)
    silent = signal(torch.full((3, 4, 2, 2), -1.0), 4)
    assert silent.firing_rate == silent.entropy == 0
    assert math.isnan(silent.kept_information)
    assert math.isnan(silent.counts.bimodality)


@pytest.fixture
def spiking():
    return timm.create_model("qsd_tiny", in_chans=1, **SMALL)


def test_every_attention_layer_of_a_network_is_measured_and_the_network_left_alone(spiking):
    spiking.train()
    spiking.stages[0].eval()  # a part that someone froze
    before = {name: tensor.clone() for name, tensor in spiking.state_dict().items()}
    images = torch.randn(8, 1, 32, 32)
    found = measure_information(spiking, [(images[:5], None), (images[5:], None)])
    assert found.images == 8
    assert [(s.layer, s.projection) for s in found.signals[:3]] == [
        ("stages.2.blocks.0.attn", p) for p in ("query", "key", "value")
    ]
    assert len(found.signals) == 4 * 3
    assert sum(found.signals[0].counts.histogram) == 8 * 16 * 4 * 4
    assert spiking.training
    assert not spiking.stages[0].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in spiking.state_dict().items())
    assert not any(m._forward_hooks for m in spiking.modules())
    spiking.eval()
    seen = []
    spiking.stages[3].blocks[0].attn.v_neuron.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    with torch.no_grad():
        spiking(images)
    last = found.signals[-1]
    assert last.membrane.mean == pytest.approx(seen[0][0].mean().item(), rel=1e-4)
    assert last.firing_rate == pytest.approx(seen[0][1].mean().item() / 4, rel=1e-4)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_float_twin_has_membranes_but_no_counts():
    found = measure_information(timm.create_model("qsd_tiny_ann", in_chans=1, **SMALL), [torch.randn(4, 1, 32, 32)])
    assert all(s.time_steps is s.counts is s.entropy is s.firing_rate is None for s in found.signals)
    assert all(s.membrane.deviation > 0 for s in found.signals)


def test_the_distance_to_a_teacher_is_the_mean_over_images_and_heads(spiking):
    teacher = Teacher(timm.create_model("qsd_tiny_ann", in_chans=1, **SMALL), "twin")
    spiking.eval()
    images = torch.randn(6, 1, 32, 32)
    found = measure_information(spiking, images.split(4), teacher)
    student = Teacher(spiking, "student")
    distances = attention_distances(student(images)[1], teacher(images)[1])
    assert found.signals[1].teacher_distance == pytest.approx(distances["key"][0].mean().item(), rel=1e-4)
    same = measure_information(teacher.network, [images], teacher)
    assert all(s.teacher_distance == 0 for s in same.signals)


def test_it_stops_after_the_images_asked_for(spiking):
    assert measure_information(spiking, torch.randn(9, 1, 32, 32).split(3), max_images=4).images == 6


def test_networks_and_data_that_hold_nothing_to_measure_are_named(spiking):
    with pytest.raises(QsdError, match="Sequential has no attention"):
        measure_information(nn.Sequential(nn.Conv2d(1, 1, 1)), [])
    with pytest.raises(QsdError, match="no images"):
        measure_information(spiking, [])
