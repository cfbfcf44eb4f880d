"""Conversion: the trained network, the count domain and binary spikes agree, neuron by neuron."""

import copy
import logging
import random

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from qsd import QsdError, audit_spike_driven, load_packed, measure_energy, save_packed
from qsd.layers import LinearChain, QuantConv2d, QuantLinear, SepConv, conv_norm, rep_conv
from qsd.neurons import LsqNeuron, QcfsNeuron, SpikeNeuron
from qsd.spiking import count_spikes, register_conversion, to_spike_driven
from qsd.spiking.layers import SpikingChain, SpikingMaxPool
from qsd.spiking.merging import fold_norms, merge_factors
from qsd.spiking.rules import RULES
from tests.helpers import sample
from tests.helpers.networks import NAMES, SMALL, assert_same_counts, dense_network, sampled


@pytest.mark.parametrize("name", sampled(NAMES))
def test_every_registered_variant_converts_without_loss_and_goes_through_audit_energy_and_files(name, tmp_path):
    # The published large E-SpikeFormer has one head that is not spike-driven, which tests of its own look at.
    options = {"spiking_head": True} if name.endswith(("_83m", "_171m")) else {}
    model, images = dense_network(name, **options), torch.randn(2, 3, 32, 48, dtype=torch.float64)
    spiking = to_spike_driven(model)
    assert_same_counts(model, spiking, images)
    audit_spike_driven(spiking, images).check()
    energy = measure_energy(spiking, images, progress=False)
    assert {layer.name for layer in energy.layers} >= {n for n, m in spiking.layers().items() if m.role == "synapse"}
    assert all(layer.energy_mj["merged"] > 0 for layer in energy.layers)
    for stored in (model, spiking):
        save_packed(stored, tmp_path / "packed.safetensors")
        assert torch.equal(load_packed(tmp_path / "packed.safetensors")(images), stored(images))


@pytest.mark.parametrize("time_steps", sample([3], [1, 2, 3, 4, 6, 8]))
@pytest.mark.parametrize("merge", [True, False, "rep", "sep"])
def test_every_window_and_merge_with_odd_sizes_and_batches(time_steps, merge):
    model = dense_network(time_steps=time_steps)
    spiking = to_spike_driven(model, merge=merge)
    for batch in (1, 3):
        assert_same_counts(model, spiking, torch.randn(batch, 3, 41, 50, dtype=torch.float64))


@pytest.mark.parametrize("activation", ["lsq", "qcfs"])
@pytest.mark.parametrize("time_steps", sample([1, 3, 4], [1, 2, 3, 4, 6, 8]))
def test_csdformer_converts_for_every_window_and_activation_with_odd_sizes_and_batches(time_steps, activation):
    model = dense_network("csdformer_4_256", time_steps=time_steps, activation=activation)
    for neuron in model.modules():
        if isinstance(neuron, QcfsNeuron):
            neuron.ceiling.data.fill_(random.uniform(0.8, 2))
    spiking = to_spike_driven(model)
    for batch, size in ((1, (11, 19)), (3, (4, 30))):
        assert_same_counts(model, spiking, torch.randn(batch, 3, *size, dtype=torch.float64))


def test_batch_norms_that_were_synchronised_over_gpus_convert():
    model, images = dense_network(), torch.randn(2, 3, 32, 48, dtype=torch.float64)
    expected = to_spike_driven(model)(images)
    assert torch.equal(to_spike_driven(nn.SyncBatchNorm.convert_sync_batchnorm(model))(images), expected)


def test_low_bit_weights_of_csdformer_convert():
    model = dense_network("csdformer_4_256", weight_bits=4)
    assert_same_counts(model, to_spike_driven(model), torch.randn(2, 3, 16, 16, dtype=torch.float64))


def test_ties_of_integer_products_are_decided_alike():
    # With all steps 1/2 and 16 channels a head, thresholds are binary fractions: products lie on them, often.
    model = dense_network("csdformer_4_256", num_heads=2, depth=1)
    attention = model.blocks[0].attn
    for neuron in attention.modules():
        if isinstance(neuron, LsqNeuron):
            neuron.step.data.fill_(0.5)
    seen = []
    attention.score_neuron.register_forward_hook(lambda m, i, o: seen.append(m.drive(*i)))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_same_counts(model, to_spike_driven(model), images)
    drive = seen[-1]
    assert ((drive % 1) == 0.5).double().mean() > 0.05


def test_latency_of_csdformer_is_the_paper_s_network_s():
    # 4 neurons in the tokenizer, 6 in each block, and ours in front of the head: 4 + (4 + 8 * 6 + 1) * 3
    spiking = to_spike_driven(dense_network("csdformer_8_384", depth=8))
    assert spiking.latency() == 160 + 3
    assert spiking.latency(0) == 4
    assert spiking.latency({"head_neuron": 0}) == 160
    assert spiking.interval() == 4 + 3
    assert to_spike_driven(dense_network("csdformer_4_384", depth=4)).latency() == 88 + 3


def test_another_window_at_conversion_is_another_network_and_a_warning_says_so(caplog):
    model, images = dense_network("csdformer_4_256"), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        spiking = to_spike_driven(model, time_steps=8)
    assert "trained with T = 4 and converted with T = 8" in caplog.text
    assert "Expect to lose accuracy" in caplog.text
    assert spiking.time_steps == 8
    assert {m.time_steps for m in model.modules() if isinstance(m, SpikeNeuron)} == {4}, "the model is not changed"
    finer = copy.deepcopy(model)
    for neuron in finer.modules():
        if isinstance(neuron, LsqNeuron):
            neuron.change_time_steps(8)
    assert_same_counts(finer, spiking, images)
    caplog.clear()
    to_spike_driven(model, time_steps=4)
    assert not caplog.text
    with pytest.raises(QsdError, match="time_steps=8: neurons of a fixed step were trained with T = 4"):
        to_spike_driven(dense_network(), time_steps=8)
    with pytest.raises(QsdError, match="time_steps=0"):
        to_spike_driven(model, time_steps=0)


def test_images_too_small_for_the_pools_are_named_by_the_converted_network_too():
    spiking = to_spike_driven(dense_network("csdformer_8_384"))
    with pytest.raises(QsdError, match="8x40 pixels are smaller than the network's total stride 16"):
        spiking(torch.randn(1, 3, 8, 40, dtype=torch.float64))


def test_latency_is_the_published_network_s():
    # T + the neurons on the longest path times T - 1 + T - 1 for each attention: 4 + 61 * 3 + 8 * 3
    spiking = to_spike_driven(timm.create_model("qsd_15m", **{**SMALL, "depth": 8}), merge=False)
    assert spiking.latency() == 4 + 61 * 3 + 8 * 3 == 211
    assert spiking.latency(0) == 4 + 8 * 3
    assert spiking.latency({"stem.blocks.0.*neuron1": 0}) == 211 - 2 * 3  # of the separable and of the dense pair


def test_spikes_are_binary_contiguous_and_recorded_by_name():
    model = dense_network()
    spiking, images = to_spike_driven(model), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    counts = count_spikes(model, images)
    trace = spiking.simulate(images, record=("head_neuron", "*.attn.q_neuron"))
    assert set(trace.spikes) == {"head_neuron", *(n for n in counts if n.endswith("attn.q_neuron"))}
    for name, spikes in trace.spikes.items():
        assert spikes.dtype == torch.bool
        assert spikes.shape == (4, *counts[name].shape)
        assert torch.equal(spikes, torch.arange(4).view(4, *[1] * counts[name].dim()) < counts[name])
        assert torch.equal(trace.counts[name], counts[name].to(torch.uint8))
        assert trace.membrane[name].shape == (7, *counts[name].shape)
    neuron = spiking.neurons()["head_neuron"]
    final = trace.membrane["head_neuron"][3]  # all input is in, nothing was fired yet
    assert torch.equal(((final / neuron.threshold).floor()).clamp(0, 4), counts["head_neuron"])


@pytest.mark.parametrize("name", ["qsd_tiny", "csdformer_4_256"])
def test_below_the_lossless_delay_counts_err_within_the_bound_and_calling_is_refused(name):
    model = dense_network(name)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    lossless, hasty = to_spike_driven(model), to_spike_driven(model, delay={"*": 3, "head_neuron": 1})
    with pytest.raises(QsdError, match=r"head_neuron has a delay of 1, below T - 1 = 3.*simulate"):
        hasty(images)
    exact = lossless.simulate(images, record="head_neuron").counts["head_neuron"].int()
    early = hasty.simulate(images, record="head_neuron").counts["head_neuron"].int()
    assert (exact - early).abs().max() <= 4 - 1 - 1
    logits = [lossless.simulate(images, delay=d).logits for d in range(4)]
    assert torch.equal(logits[3], lossless.simulate(images).logits)
    assert not torch.allclose(logits[0], logits[3])
    assert torch.equal(hasty.simulate(images, delay=3).logits, logits[3])  # an argument overrides what is stored


@pytest.mark.parametrize("name", ["qsd_tiny", "csdformer_4_256"])
def test_results_do_not_depend_on_the_rest_of_the_batch(name):
    spiking = to_spike_driven(dense_network(name))
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for delay in (0, 3):
        together = spiking.simulate(images, delay=delay).logits
        alone = torch.cat([spiking.simulate(image[None], delay=delay).logits for image in images])
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


def test_many_images_are_simulated_a_few_at_a_time_and_come_back_as_one_recording(monkeypatch):
    spiking = to_spike_driven(dense_network())
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    runs = []
    for limit in (5, 2):  # images at a time, the last part smaller
        monkeypatch.setattr("qsd.spiking.network._PIXELS_AT_A_TIME", limit * 4 * 32 * 32)
        counts = {}
        with spiking.runtime.counting(counts):
            runs.append((spiking.simulate(images, record=("head_neuron", "*.q_neuron")), counts))
    (whole, counts), (parts, counts_of_parts) = runs
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-12, atol=1e-12)
    assert parts.latency == whole.latency
    for ours, theirs in ((parts.spikes, whole.spikes), (parts.counts, whole.counts), (counts_of_parts, counts)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    torch.testing.assert_close(parts.membrane, whole.membrane, rtol=1e-10, atol=1e-10)


def test_the_trained_model_stays_as_it_was_and_keeps_its_type():
    model = dense_network().float().train()
    before = copy.deepcopy(model.state_dict())
    spiking = to_spike_driven(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {b.dtype for b in spiking.network.buffers()} == {torch.float32}
    assert not list(spiking.parameters())


@pytest.mark.parametrize(
    "chain", [rep_conv(6), SepConv(4).reduce, conv_norm(5, 7, 3, stride=2, bias=True)], ids=["rep", "sep", "plain"]
)
@pytest.mark.parametrize("size", [(1, 1), (5, 6)])
def test_merged_kernels_are_exact_borders_included(chain, size):
    chain = chain.double().eval()
    for norm in chain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.bias.data.normal_()
    merged = merge_factors(list(fold_norms(chain, "chain").values()), "chain")
    first = next(m for m in chain.modules() if isinstance(m, QuantConv2d))
    x = torch.randn(2, first.in_channels, *size, dtype=torch.float64)
    torch.testing.assert_close(merged(x), chain(x), rtol=1e-12, atol=1e-12)


def test_merged_bits_quantize_merged_kernels_and_both_ways_still_agree():
    model = dense_network()
    spiking, images = to_spike_driven(model, merged_bits=4), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    chain = next(m for m in spiking.modules() if isinstance(m, SpikingChain) and m.merged is not None)
    kernel = chain.merged.weight[0]
    assert len((kernel / kernel.abs().max()).unique()) <= 15
    stepped = {}
    with spiking.runtime.counting(stepped):
        spiking.simulate(images)
    assert all(torch.equal(count, stepped[name]) for name, count in count_spikes(spiking, images).items())
    exact = count_spikes(model, images)
    assert any(not torch.equal(count, exact[name]) for name, count in count_spikes(spiking, images).items())


# -- models of users ---------------------------------------------------------------------------------------------------


def test_a_model_built_from_our_layers_converts():
    model = nn.Sequential(
        conv_norm(2, 6, 3), SpikeNeuron(3), nn.Dropout(0.5), QuantConv2d(6, 4, 3, stride=2, bias=True, weight_bits=3),
        SpikeNeuron(3, threshold=0.7), nn.Flatten(), QuantLinear(4 * 3 * 3, 5),
    ).double().eval()  # fmt: skip
    images = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    spiking = to_spike_driven(model, example=images[:1])
    assert_same_counts(model, spiking, images)
    assert spiking.latency() == 3 + 2 * 2


class Cheat(nn.Module):
    def __init__(self, trick):
        super().__init__()
        self.first, self.neuron, self.second = conv_norm(3, 4, 3), SpikeNeuron(4), conv_norm(4, 4, 3)
        self.last, self.trick = SpikeNeuron(4), trick

    def forward(self, x):
        return self.last(self.trick(self.second(self.neuron(self.first(x)))))


@pytest.mark.parametrize("delay", [0, 1, 2, 3])
def test_a_max_pool_in_a_model_of_ones_own_is_exact_at_every_delay(delay):
    # Also in front of all neurons, on the image, and on currents between a convolution and its neuron.
    model = nn.Sequential(
        nn.MaxPool2d(2, 1, 1), conv_norm(2, 6, 3), SpikeNeuron(4, 0.2), nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        conv_norm(6, 4, 3), nn.MaxPool2d((1, 2)), SpikeNeuron(4, 0.3), nn.MaxPool2d(3, 1, 1), QuantConv2d(4, 3, 1),
    ).double().eval()  # fmt: skip
    images = torch.randn(2, 2, 13, 10, dtype=torch.float64)
    spiking = to_spike_driven(model, example=images[:1])
    # A pool adds nothing of its own: counts are pooled, whatever the delay was that made them.
    trace = spiking.simulate(images, delay=delay, record="*")
    inner = model[8](model[7](trace.counts["6"].double() * 0.3))
    torch.testing.assert_close(trace.logits, inner, rtol=1e-10, atol=1e-12)
    if delay == 3:
        assert_same_counts(model, spiking, images)
    with pytest.raises(QsdError, match="max-pool 1 returns indices"):
        to_spike_driven(nn.Sequential(conv_norm(2, 3, 3), nn.MaxPool2d(2, return_indices=True), SpikeNeuron(4)))


def test_taking_any_spike_of_a_window_in_each_step_breaks_exactness_below_the_lossless_delay(monkeypatch):
    # So that nobody simplifies the pool to it: at T - 1 it is right, below it counts what two neurons fire in turn.
    model = dense_network("csdformer_4_256")
    spiking, images = to_spike_driven(model), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    pools = [m for m in spiking.modules() if isinstance(m, SpikingMaxPool)]
    pooled = {}
    for pool in pools:
        pool.register_forward_hook(lambda m, i, o: pooled.setdefault(m.name, []).append((i[0], o)))

    def errors(delay):
        pooled.clear()
        spiking.simulate(images, delay=delay)
        wrong = []
        for pool in pools:
            spikes, out = pooled[pool.name][-1]  # the first call is the tracing
            exact = F.max_pool2d(spiking_counts(spikes), 3, 2, 1)
            wrong.append((spiking_counts(out) != exact).double().mean())
            assert set(out.unique().tolist()) <= {0, 1}
        return max(wrong)

    def spiking_counts(spikes):
        return spikes.unflatten(0, (4, 2)).sum(0)

    assert [errors(delay) for delay in range(4)] == [0, 0, 0, 0]
    monkeypatch.setattr(SpikingMaxPool, "without_gaps", property(lambda self: True))
    assert errors(3) == 0
    assert errors(0) > 0.01


def test_a_hard_reset_breaks_exactness_of_the_whole_network(monkeypatch):
    def hard_reset(membrane, threshold, spikes):
        torch.ge(membrane, threshold, out=spikes)
        membrane.mul_(1 - spikes)

    model = dense_network("csdformer_4_256")
    spiking, images = to_spike_driven(model), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    exact, hard = count_spikes(model, images), {}
    monkeypatch.setattr("qsd.spiking.layers.neuron.fire", hard_reset)
    with spiking.runtime.counting(hard):
        spiking.simulate(images)
    wrong = torch.cat([(hard[name] != exact[name]).flatten() for name in exact])
    assert wrong.double().mean() > 0.1


@pytest.mark.parametrize(
    "trick",
    [F.relu, lambda x: x + 0.3, torch.square, lambda x: 9 * x * x.abs().mean()],
    ids=["relu", "constant", "square", "gate"],
)
def test_what_a_forward_does_behind_our_back_is_found(trick):
    with pytest.raises(QsdError, match=r"the simulation differs from the trained network at neuron last"):
        to_spike_driven(Cheat(trick))


def test_layers_without_a_rule_are_named_and_can_get_one():
    class Halve(nn.Module):
        def forward(self, x):
            return x / 2

    model = nn.Sequential(conv_norm(3, 4, 3), SpikeNeuron(4), nn.Sequential(Halve()), conv_norm(4, 2, 3))
    with pytest.raises(QsdError, match=r"layer 2\.0 \(Halve\) is no layer of qsd.*register_conversion\(Halve\)"):
        to_spike_driven(model)
    register_conversion(Halve)(lambda module, name, conversion: module)
    try:
        model.eval()
        images = torch.randn(1, 3, 8, 8)
        torch.testing.assert_close(to_spike_driven(model).simulate(images).logits, model(images))
    finally:
        del RULES[Halve]
    with pytest.raises(QsdError, match=r"layer 1 \(ReLU\) is no layer of qsd"):
        to_spike_driven(nn.Sequential(conv_norm(3, 4, 3), nn.ReLU(), SpikeNeuron(4)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"merge": "some"}, "merge='some' is unknown; use 'all', 'none', 'rep' or 'sep'"),
        ({"merge": False, "merged_bits": 4}, "merged_bits needs merged kernels"),
        ({"merged_bits": 1}, "merged_bits=1 is not from 2 to 16"),
        ({"delay": -1}, "is negative"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(QsdError, match=message):
        to_spike_driven(dense_network(), **arguments)


def test_networks_that_cannot_be_converted_say_why():
    with pytest.raises(QsdError, match=r"found: none\. Float twins cannot be converted"):
        to_spike_driven(timm.create_model("qsd_tiny_ann", **SMALL))
    with pytest.raises(QsdError, match="found: 2, 4"):
        to_spike_driven(nn.Sequential(conv_norm(3, 4, 3), SpikeNeuron(4), conv_norm(4, 4, 3), SpikeNeuron(2)))
    with pytest.raises(QsdError, match="names no neuron"):
        to_spike_driven(dense_network()).simulate(torch.randn(1, 3, 32, 32, dtype=torch.float64), record="nothing")
    two = LinearChain(a=QuantConv2d(4, 4, 3, padding=1), b=QuantConv2d(4, 4, 3, padding=1))
    model = nn.Sequential(conv_norm(3, 4, 3), SpikeNeuron(4), two, SpikeNeuron(4))
    with pytest.raises(QsdError, match="chain 2 is no single convolution; convert it with merge='none'"):
        to_spike_driven(model)
    to_spike_driven(model, merge=False)


@pytest.mark.parametrize("name", ["qsd_tiny", "e_spikeformer_tiny", "e_spikeformer_83m"])
def test_a_batch_of_no_images_gives_an_empty_result_in_every_form_of_registered_networks(name):
    model = dense_network(name, time_steps=2)
    spiking, none = to_spike_driven(model), torch.zeros(0, 3, 32, 32, dtype=torch.float64)
    shape = (0, model.num_classes)
    assert model(none).shape == spiking(none).shape == spiking.simulate(none).logits.shape == shape
    assert spiking.stream([none]).logits[0].shape == shape
    for counts in (count_spikes(model, none), count_spikes(spiking, none)):
        assert all(len(count) == 0 for count in counts.values())
