"""Networks of integers: the counts of the network in float64, by integers alone, and by additions in steps."""

import numpy as np
import pytest
import torch
from torch import nn

import qsd
from qsd.integer.scaling import Rescaling, Table
from qsd.integer.signals import Signal
from qsd.integer.thresholds import integer_thresholds
from qsd.layers import LinearChain, QuantConv2d, TokenMeanLinear
from qsd.neurons import SpikeNeuron
from qsd.spiking.layers import DelayedNeuron, HalfEvenNeuron
from qsd.spiking.runtime import Runtime
from tests.helpers import sample
from tests.helpers.exporting import CSD, ESF, QSD, spiking_network

HALF_EVEN = (ESF[0], {**ESF[1], "rounding": "half_even"})
NETWORKS = {
    "csdformer": (CSD, {}),
    "qsd merged": (QSD, {"merged_bits": 8}),
    "qsd factored": (QSD, {}),
    "e-spikeformer": (ESF, {}),
    "e-spikeformer half even": (HALF_EVEN, {}),
}
# Exact without a search, because every chain is one convolution of spikes.
ADDING = ("csdformer", "qsd merged", "e-spikeformer", "e-spikeformer half even")


@pytest.mark.parametrize("name", sample(["csdformer", "qsd factored", "e-spikeformer half even"], [*NETWORKS]))
def test_counts_and_steps_are_those_of_the_network_in_float64(name):
    network, options = NETWORKS[name]
    spiking, images = spiking_network(*network, double=True, **options)
    # The bits are searched for one network, which is enough to test the search.
    integers = qsd.to_integer(spiking, images[:4], None if name == "csdformer" else 26)
    assert bool(integers.search) == (name == "csdformer")
    pixels = integers.pixels(images[:4])
    counts, steps = integers.count(pixels).signals, integers.simulate(pixels[:1])
    expected = qsd.count_spikes(spiking, integers.images(pixels))
    assert set(integers.neurons()) == set(expected)
    for neuron, count in expected.items():
        np.testing.assert_array_equal(counts[neuron], count.numpy(), err_msg=neuron)
        spikes = steps.signals[neuron]
        assert set(np.unique(spikes)) <= {0, 1}
        np.testing.assert_array_equal(spikes.sum(0), count[:1].numpy(), err_msg=neuron)
    np.testing.assert_array_equal(integers.output(steps), integers(pixels[:1]))
    real = integers(pixels) * integers.description.output_unit
    torch.testing.assert_close(torch.from_numpy(real), spiking(integers.images(pixels)), rtol=1e-3, atol=1e-3)
    assert all(values.dtype.kind == "i" for values in integers.arrays.values())
    assert max(layer.signal for layer in integers.widths()) <= 32
    assert integers.compare(spiking, images[:4]).changed == 0


def test_a_changed_count_has_a_membrane_within_its_bound_of_a_threshold():
    spiking, images = spiking_network(*CSD, double=True)
    integers = qsd.to_integer(spiking, images[:4], fractional_bits=9)  # Few bits, so that counts change.
    comparison = integers.compare(spiking, images[:4])
    pixels = integers.pixels(images[:4])
    counts, expected = integers.count(pixels).signals, qsd.count_spikes(spiking, integers.images(pixels))
    differing = {name: (counts[name] != expected[name].numpy()).reshape(4, -1).sum(1) for name in integers.neurons()}
    assert comparison.changed == len(comparison.reasons) == sum(np.any([*differing.values()], 0)) > 0
    for reason in comparison.reasons:
        first = next(name for name, number in differing.items() if number[reason.image])
        assert (reason.neuron, reason.counts) == (first, differing[first][reason.image])
        assert 0 <= reason.distance <= reason.bound <= integers.bounds[first]
    assert sum(comparison.first.values()) == comparison.changed


@pytest.mark.parametrize("name", sample(["csdformer", "qsd factored"], [*NETWORKS]))
def test_the_audit_finds_multiplications_in_factored_chains_alone(name):
    network, options = NETWORKS[name]
    spiking, images = spiking_network(*network, double=True, **options)
    integers = qsd.to_integer(spiking, images[:2], fractional_bits=12)
    audit = integers.audit(integers.pixels(images[:1]))
    if name in ADDING:
        audit.check()
        assert {layer.name for layer in audit.layers if layer.operands} <= {
            layer.name for layer in audit.layers if layer.image
        }
        return
    chains = {name for name, chain in spiking.chains().items() if len(chain.convolutions) > 1}
    multiplying = {layer.name for layer in audit.multiplying}
    assert all(any(layer.startswith(chain) for chain in chains) for layer in multiplying)
    assert chains <= multiplying | {name.removesuffix(".sum") for name in multiplying}
    with pytest.raises(qsd.QsdError, match=r"multiplies .* bits in steps, .* convert with merged_bits"):
        audit.check()


@pytest.mark.parametrize("rounding", ["half_up", "half_even"])
@pytest.mark.parametrize("time_steps", [1, 3, 4])
def test_integer_thresholds_give_the_count_of_every_sum(rounding, time_steps):
    generator = np.random.default_rng(time_steps)
    channels = 40
    unit = generator.normal(0, 0.05, channels)
    unit[:3] = 0, 1 / 8, -1 / 8  # Silenced; and with exact ties, both ways round.
    offset = generator.normal(0, 0.3, channels)
    offset[1:3] = 0
    low, high = -generator.integers(1, 60, channels), generator.integers(1, 60, channels)
    signal = Signal("x", (channels, 1, 1), "currents", low, high, unit, offset, np.zeros(channels))
    kind = HalfEvenNeuron if rounding == "half_even" else DelayedNeuron
    neuron = kind(SpikeNeuron(time_steps, rounding=rounding), "neuron", time_steps - 1, Runtime(time_steps))
    thresholds, direction = integer_thresholds(neuron, signal, ())
    assert thresholds.shape == (channels, time_steps)
    for channel in range(channels):
        sums = np.arange(low[channel], high[channel] + 1)
        expected = neuron.spike_counts(torch.from_numpy(sums * unit[channel] + offset[channel])).numpy()
        reached = (sums * direction[channel])[:, None] >= thresholds[channel]
        np.testing.assert_array_equal(reached.sum(1), expected)
        assert (np.diff(thresholds[channel]) >= 0).all()


def test_tables_and_rescalings_are_as_near_as_they_say():
    generator = np.random.default_rng(0)
    factor = generator.normal(0, 300, 50)
    factor[0] = 0
    weights = np.arange(-8, 8)[None].repeat(50, 0)
    table = Table.of(factor, 4)
    assert np.abs(table.entries(weights) - weights * factor[:, None]).max() <= 0.5 + 1e-3
    assert np.abs(table.entries(weights)).max() <= table.largest(4) < 2**31
    for largest in (5, 3000, 2**20, 2**31 - 1):
        low, high = np.full(50, -largest), np.full(50, largest)
        scaling = Rescaling.of(factor / largest)
        values = generator.integers(-largest, largest + 1, (50, 100))
        values[:, 0], values[:, 1] = -largest, largest
        assert np.abs(scaling.products(values)).max() < 2**55
        miss = np.abs(scaling.apply(values) - values * (factor / largest)[:, None]).max(1)
        assert (miss <= scaling.error(factor / largest, low, high) + 1e-9).all()


def test_bytes_of_an_image_keep_their_normalisation():
    spiking, _ = spiking_network(*CSD, double=True)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    images = (torch.from_numpy(pixels) / 255.0 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    integers = qsd.to_integer(spiking, images, 24, mean=mean, std=std)
    np.testing.assert_array_equal(integers.pixels(images), pixels)
    torch.testing.assert_close(integers.images(pixels), images.double(), rtol=0, atol=1e-6)
    assert integers.compare(spiking, images).changed == 0
    with pytest.raises(qsd.QsdError, match="no normalisation of 3 channels"):
        qsd.to_integer(spiking, images, mean=(0.5,), std=(0.5,))


def test_events_are_spikes_and_nothing_multiplies():
    model = small_network(QuantConv2d(4, 4, 3, weight_bits=4), SpikeNeuron(4)).double()
    events = torch.randint(0, 5, (3, 1, 8, 8), dtype=torch.float64)
    spiking = qsd.to_spike_driven(model)
    network = qsd.to_integer(spiking, events, events=True)
    pixels = network.pixels(events)
    np.testing.assert_array_equal(pixels, events.numpy())
    steps = network.simulate(pixels)
    assert not steps.multiplications
    np.testing.assert_array_equal(network.output(steps), network(pixels))
    assert network.compare(spiking, events).changed == 0
    with pytest.raises(qsd.QsdError, match="layer image leaves its range from 0 to 4"):
        network(pixels + np.uint8(4))


def small_network(*middle, bits=4):
    first = QuantConv2d(1, 4, 3, padding=1, weight_bits=bits)
    return nn.Sequential(first, SpikeNeuron(4), *middle, TokenMeanLinear(4, 2, bits)).eval()


def test_mistakes_are_one_line_with_the_name_of_the_layer():
    images = torch.randn(2, 1, 8, 8)
    depthwise = [QuantConv2d(4, 4, 7, padding=3, groups=4, weight_bits=8) for _ in range(3)]
    for layer in depthwise:
        nn.init.constant_(layer.weight, 1e3)  # The largest integer of the grid.
    wide = small_network(LinearChain(**{f"conv{i}": layer for i, layer in enumerate(depthwise)}), SpikeNeuron(4))
    spiking = qsd.to_spike_driven(small_network().double())
    network = qsd.to_integer(spiking, images, 8)
    with pytest.raises(qsd.QsdError, match=r"layer image takes bytes of the shape \[B, 1, 8, 8\], and got uint8"):
        network(np.zeros((1, 1, 9, 9), np.uint8))
    with pytest.raises(qsd.QsdError, match=r"layer 2: integers from .* need 4\d bits, and at most 32"):
        qsd.to_integer(qsd.to_spike_driven(wide.double(), merge="none"), images)
    with pytest.raises(qsd.QsdError, match="inner_bits=2 is not from 4 to 24"):
        qsd.to_integer(spiking, images, inner_bits=2)
    for build, options, message in (
        (lambda: small_network(bits=None), {}, "layer 0 has float weights"),
        (small_network, {"delay": 0}, "neuron 1 fires before its input is complete"),
        (small_network, {"code": "binary"}, "use code='unary'"),
        (
            lambda: small_network(nn.Upsample(scale_factor=2)),
            {},
            "spikes of neuron 1 meet an operation that is no layer",
        ),
        (
            lambda: small_network(QuantConv2d(4, 4, 1), nn.Upsample(scale_factor=2), SpikeNeuron(4)),
            {},
            "operation upsample_nearest2d between layers has no integers",
        ),
    ):
        with pytest.raises(qsd.QsdError, match=message) as error:
            qsd.to_integer(qsd.to_spike_driven(build().double(), **options), images)
        assert "\n" not in str(error.value)
