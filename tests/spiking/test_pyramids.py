"""Layers that run several times in a pass, and networks that take currents: what detectors are made of."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qsd import QsdError
from qsd.energy import OperationCounter, measure_energy
from qsd.layers import QuantConv2d, QuantLinear, conv_norm, initialize_steps
from qsd.neurons import SpikeNeuron
from qsd.spiking import audit_spike_driven, compare_counts, count_spikes, to_spike_driven


class Pyramid(nn.Module):
    """A head that three levels share, behind an enlargement, a subsampling and rearranged channels."""

    def __init__(self, time_steps=3):
        super().__init__()
        self.stem = conv_norm(3, 8, 3)
        self.enlarge = nn.Sequential(SpikeNeuron(time_steps), QuantConv2d(8, 16, 1), nn.PixelShuffle(2))
        self.inner = nn.Sequential(SpikeNeuron(time_steps), nn.Dropout2d(), QuantConv2d(8, 4, 3, padding=1))
        self.head = nn.Sequential(SpikeNeuron(time_steps), QuantConv2d(4, 5, 3, padding=1))

    def forward(self, x):
        x = self.stem(x)
        fine = self.enlarge(x)
        middle = self.inner(x)
        fine = fine + F.interpolate(middle, size=fine.shape[2:], mode="bilinear", align_corners=False)
        levels = [fine, middle, F.max_pool2d(middle, 1, stride=2)]
        return {"features": middle, "outputs": [self.head(level) for level in levels]}


class Region(nn.Module):
    """Currents to classes, as a head of regions."""

    def __init__(self, time_steps=3):
        super().__init__()
        self.neuron1, self.neuron2 = SpikeNeuron(time_steps), SpikeNeuron(time_steps)
        self.fc1, self.fc2 = QuantLinear(4 * 3 * 3, 12), QuantLinear(12, 5)

    def forward(self, x):
        return self.fc2(self.neuron2(self.fc1(self.neuron1(x.flatten(1)))))


def lively(model):
    """Weights that make neurons fire."""
    for module in model.modules():
        if isinstance(module, QuantConv2d | QuantLinear):
            nn.init.normal_(module.weight, std=1.5 * module.weight[0].numel() ** -0.5)
    initialize_steps(model)
    return model.double().eval()


@pytest.fixture
def pyramid():
    return lively(Pyramid())


@pytest.fixture
def images():
    return torch.randn(2, 3, 12, 16, dtype=torch.float64)


def test_each_call_of_a_shared_neuron_is_counted_under_a_name_of_its_own(pyramid, images):
    seen = []
    handle = pyramid.head[0].register_forward_hook(lambda m, i, o: seen.append(o / m.amplitude))
    counts = count_spikes(pyramid, images)
    handle.remove()
    assert set(counts) == {"enlarge.0", "inner.0", "head.0@0", "head.0@1", "head.0@2"}
    for level, expected in enumerate(seen):
        torch.testing.assert_close(counts[f"head.0@{level}"], expected)
    spiking = to_spike_driven(pyramid)
    converted = count_spikes(spiking, images)
    trace = spiking.simulate(images, record="*")
    assert counts.keys() == converted.keys() == trace.counts.keys()
    for name, count in counts.items():
        assert 0 < count.sum() < 3 * count.numel(), name
        assert torch.equal(count, converted[name]), name
        assert torch.equal(count, trace.spikes[name].sum(0).double()), name


def test_a_shared_neuron_is_recorded_by_its_name_or_by_call(pyramid, images):
    spiking = to_spike_driven(pyramid)
    assert set(spiking.simulate(images, record="head.0").spikes) == {f"head.0@{level}" for level in range(3)}
    assert set(spiking.simulate(images, record="*@1").spikes) == {"head.0@1"}
    with pytest.raises(QsdError, match=r"record='head.0@3' names no neuron"):
        spiking.simulate(images, record="head.0@3")


def test_all_outputs_of_a_pyramid_are_those_of_the_trained_network(pyramid, images):
    spiking = to_spike_driven(pyramid)
    trained, counted, stepped = pyramid(images), spiking(images), spiking.simulate(images).logits
    for way in (counted, stepped):
        torch.testing.assert_close(way, trained, rtol=1e-12, atol=1e-12)
    streamed = spiking.stream(images.split(1), record="head.0@2")
    for key, image in enumerate(images.split(1)):
        torch.testing.assert_close(streamed.logits[key], spiking.simulate(image).logits, rtol=1e-12, atol=1e-12)
        alone = spiking.simulate(image, record="head.0@2").counts["head.0@2"]
        assert torch.equal(streamed.counts["head.0@2"][key], alone)
    # the stem's window, then two neurons of delay 2 in a row
    assert spiking.latency() == streamed.latency == 3 + 2 * 2


def test_what_lies_between_is_linear_and_every_layer_behind_it_sees_spikes(pyramid, images):
    audit = audit_spike_driven(to_spike_driven(pyramid), images)
    audit.check()
    assert {o.name: o.status for o in audit.operations if not o.stem} == dict.fromkeys(
        ["enlarge.1", "inner.2", "head.1"], "binary"
    )


def test_a_shared_convolution_has_an_entry_of_energy_for_each_level(pyramid, images):
    spiking = to_spike_driven(pyramid)
    energy = measure_energy(spiking, images, progress=False)
    layers = {layer.name: layer for layer in energy.layers}
    counts = count_spikes(spiking, images)
    for level in range(3):
        count = counts[f"head.0@{level}"]
        # A spike is added to as many outputs as a kernel of ones spreads it to.
        ones = torch.ones(5, 4, 3, 3, dtype=torch.float64)
        reach = F.conv2d(count, ones, padding=1).sum() / 2
        assert layers[f"head.1@{level}"].additions["merged"] == pytest.approx(float(reach))
    (resize,) = (layer for layer in energy.layers if layer.kind == "resize")
    assert resize.macs["merged"] == 4 * 4 * 24 * 32  # four neighbours of each of 4 x 24 x 32 values
    assert resize.energy_mj["merged"] == resize.energy_mj["integer"] == pytest.approx(4.6e-9 * 4 * 4 * 24 * 32)


def test_comparison_looks_at_every_level(pyramid, images):
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.pyramid = pyramid

        def forward(self, x):
            return sum(level.mean((2, 3)) for level in self.pyramid(x)["outputs"])

    model = Classes()
    spiking = to_spike_driven(model)
    assert compare_counts(model, spiking, images).changed_images == 0
    neuron = spiking.neurons()["pyramid.head.0"]
    neuron.drive = lambda x: x * 3 + (x.shape[-1] == 8) * 0.9  # wrong on the third level alone
    comparison = compare_counts(model, spiking, images)
    assert comparison.changed_images == 2


@pytest.mark.parametrize("time_steps", [3, 4])
def test_a_network_of_currents_fires_the_trained_counts(time_steps):
    region = lively(Region(time_steps))
    currents = torch.randn(40, 4, 3, 3, dtype=torch.float64)
    spiking = to_spike_driven(region, example=currents[:2], currents=True)
    expected = count_spikes(region, currents)
    trace = spiking.simulate(currents, record="*")
    for name, count in expected.items():
        assert torch.equal(count, trace.counts[name].double()), name
    torch.testing.assert_close(trace.logits, region(currents), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(spiking(currents), region(currents), rtol=1e-12, atol=1e-12)
    # a current is there for T steps, then for none
    stream = spiking.stream(currents.split(20), interval=spiking.interval() + 2)
    torch.testing.assert_close(torch.cat(stream.logits), trace.logits, rtol=1e-12, atol=1e-12)
    assert spiking.latency() == time_steps + 2 * (time_steps - 1)


def test_a_network_of_currents_has_no_stem():
    region = lively(Region())
    currents = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    spiking = to_spike_driven(region, example=currents, currents=True)
    audit = audit_spike_driven(spiking, currents)
    audit.check()
    assert [(o.name, o.status, o.stem) for o in audit.operations] == [
        ("fc1", "binary", False),
        ("fc2", "binary", False),
    ]
    counter = OperationCounter(spiking)
    counter.run(currents[:3])
    counter.run(currents[3:])
    energy = counter.energy("fp32", images=2)  # of two images, say, four regions each
    assert {layer.kind for layer in energy.layers} == {"synapse"}
    spikes = count_spikes(region, currents)["neuron2"].sum()
    assert energy.layers[1].additions["merged"] == pytest.approx(float(spikes) * 5 / 2)


def test_a_weight_that_meets_a_current_is_found():
    class Bare(Region):
        def forward(self, x):
            return self.fc2(self.neuron2(self.fc1(x.flatten(1))))

    spiking = to_spike_driven(lively(Bare()), example=torch.randn(2, 4, 3, 3), currents=True)
    with pytest.raises(QsdError, match=r"fc1 \(linear\): its input is analog"):
        audit_spike_driven(spiking, torch.randn(2, 4, 3, 3, dtype=torch.float64)).check()


def test_currents_that_are_taken_for_an_image_are_named():
    with pytest.raises(QsdError, match=r"neuron neuron1 sees an image.*currents=True"):
        to_spike_driven(lively(Region()), example=torch.randn(2, 4, 3, 3))


def test_the_relu_of_a_float_twin_is_named():
    from qsd.neurons import build_neuron

    model = nn.Sequential(
        conv_norm(3, 4, 3), SpikeNeuron(4), conv_norm(4, 4, 3), build_neuron(None), conv_norm(4, 2, 3)
    )
    with pytest.raises(QsdError, match="layer 3 is the ReLU of a float twin"):
        to_spike_driven(model)
