"""What a user defines outside of the package goes the whole way: training, spikes, audit, energy, files and report."""

import copy

import pytest
import torch
from torch import nn

import qsd
from qsd import QsdError, report
from qsd.layers.steps import collapsed_step
from qsd.spiking import compare_counts, register_conversion, to_spike_driven
from qsd.spiking.layers import SpikingLinear
from qsd.spiking.rules import RULES
from tests.helpers.networks import assert_same_counts, randomize_norms
from tests.toys import (
    Blur,
    DoublingNeuron,
    SpikingBlur,
    family_network,
    layer_network,
    neuron_network,
)

IMAGES = torch.randn(4, 3, 16, 16)
TOYS = [neuron_network, layer_network, family_network]


def trained(build):
    """A network after two steps of training."""
    torch.manual_seed(0)
    model = randomize_norms(build().train(), var=(0.3, 1), bias=(0.3, 0.3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels = torch.arange(len(IMAGES))
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IMAGES), labels).backward()
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return model.eval()


@pytest.mark.parametrize("build", TOYS)
def test_a_toy_goes_the_whole_way(build, tmp_path):
    model = trained(build)
    exact, images = copy.deepcopy(model).double(), IMAGES.double()
    spiking = to_spike_driven(exact, example=images[:1])
    assert_same_counts(exact, spiking, images)
    for way in ("count", "simulate"):
        assert compare_counts(exact, spiking, images, way).equal_counts
    clocked = spiking.stream([images, images.flip(0)])
    torch.testing.assert_close(clocked.logits[1], exact(images.flip(0)), rtol=1e-10, atol=1e-12)
    for delay in range(spiking.time_steps):
        assert spiking.simulate(images, delay=delay).latency == spiking.latency(delay)

    qsd.audit_spike_driven(spiking, images).check()
    energy = qsd.measure_energy(spiking, images, progress=False)
    assert energy.layers[0].kind == "stem"
    assert all(layer.additions["merged"] > 0 for layer in energy.layers[1:])

    path = tmp_path / "spiking.safetensors"
    qsd.save_packed(spiking, path)
    skeleton = None if build is family_network else build().double()
    assert torch.equal(qsd.load_packed(path, skeleton)(images), spiking(images))
    qsd.save_packed(model, path)
    assert torch.equal(qsd.load_packed(path, None if build is family_network else build())(IMAGES), model(IMAGES))
    assert 0 < qsd.model_size(spiking).converted_bytes < qsd.model_size(spiking).float_bytes

    loader = [(IMAGES, torch.arange(len(IMAGES)))]
    _, record = report.record_conversion(model, loader, progress=False)
    assert report.html(record).startswith("<!DOCTYPE html>")


def test_the_layer_costs_what_it_says():
    exact = trained(layer_network).double()
    spiking = to_spike_driven(exact, example=IMAGES[:1].double())
    counts = qsd.count_spikes(exact, IMAGES.double())["1"]
    layer = next(e for e in qsd.measure_energy(spiking, IMAGES.double(), progress=False).layers if e.name == "2")
    reach = torch.full((16, 16), 9.0, dtype=torch.float64)
    reach[[0, -1]] *= 2 / 3
    reach[:, [0, -1]] *= 2 / 3
    assert layer.kind == "synapse"
    assert layer.additions["merged"] == pytest.approx(float((counts * reach).sum()) / len(IMAGES))
    assert layer.macs["integer"] == 9 * 6 * 16 * 16


def test_the_neuron_s_step_is_found_by_its_type():
    model = trained(neuron_network)
    assert qsd.model_size(model).parameters == sum(
        p.numel() for n, p in model.named_parameters() if not n.endswith(("quantizer.step", "theta"))
    )
    model[1].theta.data.fill_(-0.1)
    assert collapsed_step(model) == ("1", pytest.approx(-0.1))
    with pytest.raises(QsdError, match=r"step sizes that are not positive: 1\.theta"):
        to_spike_driven(model)


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_the_neuron_fires_the_same_in_steps_and_on_the_clock_at_every_delay(delay):
    exact, images = trained(neuron_network).double(), IMAGES.double()
    spiking = to_spike_driven(exact, example=images[:1], delay=delay)
    stepped, clocked = spiking.simulate(images, record="*"), spiking.stream([images, images.flip(0)], record="*")
    for name, counts in stepped.counts.items():
        assert torch.equal(clocked.counts[name][0], counts)
        assert torch.equal(stepped.spikes[name].sum(0), counts)


def test_a_neuron_without_a_rule_of_its_own_is_refused_by_its_counts():
    rule = RULES.pop(DoublingNeuron)
    try:
        with pytest.raises(QsdError, match="differs from the trained network at neuron 1"):
            to_spike_driven(trained(neuron_network), example=IMAGES[:1])
    finally:
        RULES[DoublingNeuron] = rule


class Unpriced(SpikingLinear):
    linear_map, absorb = SpikingBlur.linear_map, SpikingBlur.absorb


class Raw(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (
            lambda module, name, conversion: Unpriced(name, conversion.runtime),
            r"layer 2 was converted to a Unpriced, which does not define operations, stored_bits\.",
        ),
        (
            lambda module, name, conversion: Raw(6, 6, 1),
            r"layer 2 was converted to a Raw, whose weights no audit or energy could see",
        ),
    ],
)
def test_conversion_says_in_one_line_what_a_layer_lacks(convert, message):
    rule = RULES[Blur]
    register_conversion(Blur)(convert)
    try:
        with pytest.raises(QsdError, match=message):
            to_spike_driven(layer_network().eval())
    finally:
        RULES[Blur] = rule
