"""Operations and energy, counted by hand, by brute force, and by another package."""

import json
import warnings

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from qsd import QsdError, measure_energy, to_spike_driven
from qsd.energy import Geometry, dense_macs, fan_out
from qsd.layers import QuantConv2d, QuantLinear
from qsd.neurons import SpikeNeuron
from qsd.spiking.layers import SpikingChain
from tests.helpers.networks import dense_network

IMAGES = torch.randn(2, 3, 32, 32, dtype=torch.float64)


class Paper(nn.Module):
    """Small enough to count on paper: a 1x1 stem, a neuron, a 3x3 convolution, a neuron, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = QuantConv2d(1, 1, 1, weight_bits=None)
        self.neuron = SpikeNeuron(4)
        self.conv = QuantConv2d(1, 2, 3, padding=1, weight_bits=None)
        self.last = SpikeNeuron(4)
        self.head = QuantLinear(2 * 9, 5, weight_bits=None)
        with torch.no_grad():
            self.stem.weight.fill_(1.0)
            self.conv.weight.fill_(0.0)
            self.conv.weight[0, 0, 1, 1] = self.conv.weight[1, 0, 1, 1] = 1.0

    def forward(self, x):
        return self.head(self.last(self.conv(self.neuron(self.stem(x)))).flatten(1))


def test_a_network_that_can_be_counted_on_paper():
    image = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.25, 0.0], [0.0, 0.0, 0.0]]).view(1, 1, 3, 3)
    energy = measure_energy(to_spike_driven(Paper().eval(), example=image.double()), image, progress=False)
    stem, conv, head = energy.layers
    # stem: 9 pixels x 1 weight = 9 MACs, once
    assert (stem.kind, stem.macs["merged"], stem.additions["merged"]) == ("stem", 9, 0)
    # neuron: counts 4, 2 and 1 of T = 4. The corner pixel has 2 x 2 outputs in reach, the edge 2 x 3, the centre 3 x 3,
    # each in 2 channels: 4 * 4 * 2 + 2 * 6 * 2 + 1 * 9 * 2 = 32 + 24 + 18 = 74
    assert (conv.spikes, conv.additions["merged"], conv.macs["merged"]) == (7, 74, 0)
    assert conv.rate == pytest.approx(7 / (9 * 4))
    # the centre of both kernels is 1: both channels repeat the counts, 14 spikes, each adds a row of 5 weights
    assert (head.spikes, head.additions["merged"]) == (14, 70)
    mac, ac = 4.6e-9, 0.9e-9  # mJ
    assert energy.total == pytest.approx(9 * mac + (74 + 70) * ac)
    # papers: rate x T x dense operations: 7/36 * 4 * (9 outputs * 2 channels * 9 weights) and 14/72 * 4 * (18 * 5)
    assert energy.total_mj["papers"] == pytest.approx(9 * mac + (7 / 36 * 4 * 162 + 14 / 72 * 4 * 90) * ac)
    assert energy.total_mj["papers_stem_per_step"] - energy.total_mj["papers"] == pytest.approx(3 * 9 * mac)
    # the rival multiplies everywhere, in 3 bits for 0..4
    assert (energy.total_mj["integer"], energy.bits) == (pytest.approx((9 + 162 + 90) * mac), 3)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 3, 5, 7]), st.integers(1, 3), st.integers(0, 3),
    st.sampled_from([1, 2]),
)  # fmt: skip
def test_fan_out_at_borders_is_what_brute_force_counts(height, width, kernel, stride, padding, groups):
    if min(height, width) + 2 * padding < kernel:
        return
    geometry = Geometry(4, 2 // groups, kernel, stride, padding, groups)
    reached = fan_out((height, width), geometry)
    weight = torch.ones(4, 2 // groups, kernel, kernel)
    for i in range(height):
        for j in range(width):
            spike = torch.zeros(1, 2, height, width)
            spike[0, 0, i, j] = 1
            assert F.conv2d(spike, weight, None, stride, padding, groups=groups).sum() == reached[i, j]


def test_counting_spikes_and_stepping_through_them_agree():
    counted = to_spike_driven(dense_network())
    energy = measure_energy(counted, IMAGES, progress=False)
    # one delay below T - 1 somewhere without effect (the stem's current is constant) makes it step
    hasty = to_spike_driven(dense_network(), delay={"*": 3, "stem.blocks.0.sep_conv.neuron1": 0})
    hasty.network.load_state_dict(counted.network.state_dict())
    stepped = measure_energy(hasty, IMAGES, progress=False)
    assert [layer.name for layer in stepped.layers] == [layer.name for layer in energy.layers]
    for one, other in zip(energy.layers, stepped.layers):
        assert one.additions == pytest.approx(other.additions), one.name
        assert one.macs == pytest.approx(other.macs), one.name
        assert one.zero_skipping == pytest.approx(other.zero_skipping), one.name
        assert (one.rate, one.energy_mj) == (pytest.approx(other.rate), pytest.approx(other.energy_mj)), one.name
        for network, flows in one.moved.items():
            for flow, bits in flows.items():
                assert bits == pytest.approx(other.moved[network][flow]), (one.name, network, flow)


def test_attention_adds_dense_rows_and_fewer_if_zeros_are_skipped():
    spiking = to_spike_driven(dense_network())
    trace = spiking.simulate(IMAGES, record="stages.2.blocks.0.attn.*")
    name = "stages.2.blocks.0.attn"
    query, key, value = (trace.spikes[f"{name}.{n}_neuron"].double().flatten(3) for n in "qkv")  # [T, B, C, N]
    layers = {layer.name: layer for layer in measure_energy(spiking, IMAGES, progress=False).layers}
    product, read = layers[f"{name}.key_value"], layers[f"{name}.query"]
    head = query.shape[2] // 4  # channels of each of the 4 heads
    assert product.additions["merged"] == (key.sum() + value.sum()).item() * head / 2  # two images
    assert read.additions["merged"] == query.sum().item() * head / 2
    skipping = [0.0, 0.0]
    keys, values = torch.zeros_like(key[0]), torch.zeros_like(value[0])
    matrix = torch.einsum("bhen,bhdn->bhed", *(t.sum(0).unflatten(1, (4, head)) for t in (value, key)))
    for q, k, v in zip(query, key, value):  # spike by spike: what it meets in its head
        keys = keys + k
        for b in range(2):
            for h in range(4):
                part = slice(h * head, (h + 1) * head)
                skipping[0] += sum(
                    v[b, part, n].sum() * (keys[b, part, n] > 0).sum()
                    + k[b, part, n].sum() * (values[b, part, n] > 0).sum()
                    for n in range(q.shape[-1])
                ).item()
                skipping[1] += ((matrix[b, h] != 0).double().sum(0) @ q[b, part]).sum().item()
        values = values + v
    assert [product.zero_skipping, read.zero_skipping] == pytest.approx([s / 2 for s in skipping])
    assert product.zero_skipping <= product.additions["merged"]


def test_merged_and_unmerged_networks_give_the_same_two_columns():
    model = dense_network()
    merged, factored = to_spike_driven(model), to_spike_driven(model, merge=False)
    one, other = (measure_energy(network, IMAGES, progress=False) for network in (merged, factored))
    assert one.total_mj == pytest.approx(other.total_mj)
    assert one.total == one.total_mj["merged"]
    assert other.total == other.total_mj["unmerged"]
    inner = next(layer for layer in other.layers if layer.name.endswith("attn.q_proj"))
    # on 2 x 2 tokens of 16 channels: depthwise 3x3 and pointwise factors are analog, 9 * 16 * 4 + 16 * 16 * 4 MACs
    assert inner.macs["unmerged"] == 9 * 16 * 4 + 16 * 16 * 4
    assert inner.macs["merged"] == 0


def test_dense_operations_of_qsd_15m_are_the_known_ones():
    # factored 6.47 and merged 14.89 GMACs at 224 px (design figures); counted on the shapes of one image
    spiking = to_spike_driven(timm.create_model("qsd_15m").eval(), merge=False)
    factored = merged = 0.0
    shapes = {}
    for module in spiking.network.modules():
        if isinstance(module, SpikingChain):
            module.register_forward_pre_hook(lambda m, x: shapes.__setitem__(m.name, x[0].shape[-2:]))
    spiking(torch.zeros(1, 3, 224, 224))
    for module in spiking.network.modules():
        if isinstance(module, SpikingChain):
            factors = [c.geometry for c in module.convolutions.values()]
            factored += sum(dense_macs(factors, *shapes[module.name]))
            merged += sum(dense_macs([Geometry.merged(factors)], *shapes[module.name]))
    tokens, products = 14 * 14, 0.0
    for dim, blocks in ((256, 6), (360, 2)):
        products += blocks * 2 * tokens * dim * dim / 8
    assert (factored + products) / 1e9 == pytest.approx(6.47, abs=0.005)
    assert (merged + products) / 1e9 == pytest.approx(14.89, abs=0.005)


def test_synaptic_operations_are_those_that_spikingjelly_counts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counters = pytest.importorskip("spikingjelly.activation_based.op_counter")
    spiking = to_spike_driven(dense_network())
    counter = counters.SynOpCounter()
    with counters.DispatchCounterMode([counter]):
        spiking.simulate(IMAGES)
    seen = {str(op): n for op, n in counter.records["Global"].items()}
    layers = measure_energy(spiking, IMAGES, progress=False).layers
    convolutions = sum(
        layer.additions["merged"] for layer in layers if layer.kind == "synapse" and layer.name != "head"
    )
    (head,) = (layer.additions["merged"] for layer in layers if layer.name == "head")
    # of products it counts coincidences where both operands are binary, so only layers are compared
    assert seen["aten.convolution.default"] == pytest.approx(2 * convolutions)
    assert seen["aten.addmm.default"] == pytest.approx(2 * head)


def test_presets_price_the_same_operations():
    spiking = to_spike_driven(dense_network())
    fp32, int8 = (measure_energy(spiking, IMAGES, preset, progress=False) for preset in ("fp32", "int8"))
    assert int8.total_mj["integer"] == pytest.approx(fp32.total_mj["integer"] * 0.23 / 4.6)
    macs = sum(layer.macs["merged"] for layer in fp32.layers)
    additions = sum(layer.additions["merged"] for layer in fp32.layers)
    assert int8.total == pytest.approx((0.23 * macs + 0.03 * additions) * 1e-9)
    with pytest.raises(QsdError, match="preset='fp64' is unknown; use one of fp32, fp16, int8"):
        measure_energy(spiking, IMAGES, "fp64")


def test_a_loader_gives_the_mean_over_its_images():
    spiking = to_spike_driven(dense_network())
    together = measure_energy(spiking, IMAGES, progress=False)
    loader = [(IMAGES[:1], torch.zeros(1)), (IMAGES[1:], torch.zeros(1))]
    by_batches = measure_energy(spiking, loader, progress=False)
    assert by_batches.images == 2
    assert by_batches.total_mj == pytest.approx(together.total_mj)
    one = measure_energy(spiking, loader, max_images=1, progress=False)
    assert one.images == 1
    data = json.loads(by_batches.to_json())
    assert data["total_mj"] == pytest.approx(together.total_mj)
    assert len(data["layers"]) == by_batches.table().row_count - 1


def test_means_are_accumulations_and_what_is_no_layer_of_ours_is_a_multiplication():
    spiking = to_spike_driven(dense_network())
    mean = next(layer for layer in measure_energy(spiking, IMAGES, progress=False).layers if layer.kind == "mean")
    assert mean.additions["merged"] == 24 * 2 * 2 * 4, "a current per channel, position and step"

    class Mix(nn.Module):
        def forward(self, x):
            return x @ torch.eye(24, dtype=x.dtype)

    spiking.network.head = nn.Sequential(Mix(), spiking.network.head)
    other = next(layer for layer in measure_energy(spiking, IMAGES, progress=False).layers if layer.kind == "other")
    assert other.macs["merged"] == other.macs["integer"] == 24 * 24
