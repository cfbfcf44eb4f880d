"""CSDformer as spikes: audit, energy, packed files and float32. (Equal counts are tested with those of QSD.)"""

import pytest
import torch
from torch import nn

from qsd import (
    QsdError,
    audit_spike_driven,
    load_packed,
    measure_energy,
    model_size,
    save_packed,
    to_spike_driven,
)
from qsd.layers import QuantConv2d, TokenMean, conv_norm
from qsd.neurons import LsqNeuron, SpikeNeuron
from qsd.spiking import compare_counts
from tests.helpers.networks import NAMES, assert_same_counts, dense_network, sampled

IMAGES = torch.randn(2, 3, 32, 48, dtype=torch.float64)


@pytest.mark.parametrize("name", sampled([name for name in NAMES if name.startswith("csdformer")]))
def test_every_variant_is_spike_driven_behind_its_stem_without_any_merging(name):
    spiking = to_spike_driven(dense_network(name), merge=False)
    audit = audit_spike_driven(spiking, IMAGES)
    audit.check()
    found = {operation.name: operation for operation in audit.operations}
    assert [o.name for o in audit.operations if o.stem] == ["stem.0"]
    products = {n for n, o in found.items() if o.operation == "product"}
    assert products == {f"blocks.{i}.attn.{p}_product" for i in range(2) for p in ("score", "value")}
    assert all(found[n].bits <= 3 for n in products)  # running sums reach T = 4
    assert all(o.status == "binary" for n, o in found.items() if n not in products and not o.stem)
    assert {n for n, o in found.items() if o.operation == "pool"} == {
        f"stem.{i}.pool" for i in ((1, 2, 3, 4) if "_8_" in name else (3, 4))
    }
    # stem, four convolutions of the tokenizer, six in each block, head
    assert sum(o.operation in ("convolution", "linear") for o in found.values()) == 1 + 4 + 2 * 6 + 1


def test_below_the_lossless_delay_pools_compare_running_sums_of_spikes():
    audit = audit_spike_driven(to_spike_driven(dense_network("csdformer_4_256")), IMAGES, delay=1)
    audit.check()
    pools = [o for o in audit.operations if o.operation == "pool"]
    assert [(o.status, o.bits) for o in pools] == [("integer", 3)] * 2
    assert all(o.spike_driven for o in pools)


def test_a_max_pool_of_currents_and_a_mean_of_ones_own_are_named():
    model = nn.Sequential(conv_norm(3, 4, 3), SpikeNeuron(4), conv_norm(4, 4, 3), nn.MaxPool2d(2), SpikeNeuron(4))
    with pytest.raises(QsdError, match=r"3 \(pool\): max_pool2d_with_indices of values that are no spikes"):
        audit_spike_driven(to_spike_driven(model.double().eval()), IMAGES).check()
    mean = nn.Sequential(
        conv_norm(3, 4, 3), SpikeNeuron(4), TokenMean(), nn.Unflatten(1, (4, 1, 1)), QuantConv2d(4, 2, 1)
    )
    spiking = to_spike_driven(mean.double().eval())
    assert_same_counts(mean, spiking, IMAGES)
    with pytest.raises(QsdError, match=r"4 \(convolution\): its input is analog"):
        audit_spike_driven(spiking, IMAGES).check()


def test_additions_of_both_products_are_those_that_the_decomposition_does():
    spiking = to_spike_driven(dense_network("csdformer_4_256"))
    name, heads = "blocks.0.attn", 4
    trace = spiking.simulate(IMAGES, record=f"{name}.*")
    query, key, value = (
        trace.spikes[f"{name}.{n}_neuron"].double().flatten(3).unflatten(2, (heads, -1)) for n in "qkv"
    )  # [T, B, heads, d, N]
    scores = trace.spikes[f"{name}.score_neuron"].double()  # [T, B, heads, N, N]
    layers = {layer.name: layer for layer in measure_energy(spiking, IMAGES, progress=False).layers}

    def terms(left, right):
        """q(t) S_k(t) and S_q(t-1) k(t): additions with dense rows, and where the other operand is not zero."""
        dense = left.sum() * right.shape[-1] + right.sum() * left.shape[-2]
        skipping, lefts, rights = 0.0, torch.zeros_like(left[0]), torch.zeros_like(right[0])
        for x, y in zip(left, right):
            rights = rights + y
            skipping += (x @ (rights > 0).double()).sum() + ((lefts > 0).double() @ y).sum()
            lefts = lefts + x
        return dense.item() / 2, skipping.item() / 2  # two images

    for product, left, right in (
        ("score_product", query.transpose(-1, -2), key),
        ("value_product", value, scores.transpose(-1, -2)),
    ):
        layer = layers[f"{name}.{product}"]
        dense, skipping = terms(left, right)
        assert layer.additions["merged"] == pytest.approx(dense)
        assert layer.zero_skipping == pytest.approx(skipping)
        tokens = key.shape[-1]
        assert layer.macs["integer"] == heads * tokens * tokens * key.shape[-2]


def test_the_head_adds_a_column_of_weights_per_spike_and_its_rival_multiplies_the_mean():
    spiking = to_spike_driven(dense_network("csdformer_4_256"))
    counts = spiking.simulate(IMAGES, record="head_neuron").counts["head_neuron"]
    head = measure_energy(spiking, IMAGES, progress=False).layers[-1]
    assert head.name == "head"
    assert head.additions["merged"] == counts.sum().item() * 5 / 2  # classes, images
    assert head.macs["integer"] == 32 * 5


def test_counting_and_stepping_cost_the_same_and_running_sums_of_pools_cost_one_addition_per_spike():
    torch.manual_seed(1)
    model = dense_network("csdformer_4_256")
    counted = measure_energy(to_spike_driven(model), IMAGES, progress=False)
    # the first neuron sees a constant current: fired at once it sends the same number of spikes
    stepped = measure_energy(to_spike_driven(model, delay={"*": 3, "stem.1.neuron": 0}), IMAGES, progress=False)
    assert [layer.name for layer in stepped.layers] == [layer.name for layer in counted.layers]
    for one, other in zip(counted.layers, stepped.layers):
        assert one.additions == pytest.approx(other.additions), one.name
        assert one.zero_skipping == pytest.approx(other.zero_skipping), one.name
    hasty = to_spike_driven(model, delay={"*": 3, "stem.3.neuron": 1})
    pool = {layer.name: layer for layer in measure_energy(hasty, IMAGES, progress=False).layers}["stem.3.pool"]
    spikes = hasty.simulate(IMAGES, record="stem.3.neuron").counts["stem.3.neuron"].sum().item()
    assert pool.kind == "pool"
    assert pool.additions == {"merged": spikes / 2, "unmerged": spikes / 2}
    assert 0 < pool.rate < 1


@pytest.mark.parametrize("options", [{}, {"weight_bits": 4}, {"activation": "qcfs"}])
def test_packed_files_of_csdformer_give_the_same_bits(options, tmp_path):
    model = dense_network("csdformer_4_256", **options).float()
    for neuron in model.modules():
        if hasattr(neuron, "ceiling"):
            neuron.ceiling.data.fill_(1.3)
    images = IMAGES.float()
    save_packed(model, tmp_path / "model.safetensors")
    assert torch.equal(load_packed(tmp_path / "model.safetensors")(images), model(images))
    spiking = to_spike_driven(model, delay={"*": 3, "head_neuron": 2})
    save_packed(spiking, tmp_path / "spiking.safetensors")
    loaded = load_packed(tmp_path / "spiking.safetensors")
    assert torch.equal(loaded.simulate(images).logits, spiking.simulate(images).logits)
    assert loaded.simulate(images[..., :20, :20]).logits.shape == (2, 5)  # for any number of tokens
    assert model_size(model).parameters == sum(
        p.numel() for n, p in model.named_parameters() if not n.endswith(("step", "ceiling"))
    )


def test_a_packed_file_keeps_a_window_that_was_changed_at_conversion(tmp_path):
    model = dense_network("csdformer_4_256")
    spiking = to_spike_driven(model, time_steps=6)
    save_packed(spiking, tmp_path / "six.safetensors")
    loaded = load_packed(tmp_path / "six.safetensors")
    assert loaded.time_steps == 6
    assert torch.equal(loaded(IMAGES), spiking(IMAGES))
    assert model.registered["arguments"].get("time_steps", 4) == 4


@pytest.mark.parametrize("way", ["count", "simulate"])
def test_in_float32_the_first_neurons_that_differ_lie_on_a_threshold(way):
    model = dense_network("csdformer_4_256").float()
    images = torch.randn(8, 3, 24, 24)
    comparison = compare_counts(model, to_spike_driven(model), images, way)
    assert (comparison.farthest_first_difference or 0) < 1e-4
    exact = compare_counts(model.double(), to_spike_driven(model), images.double(), way)
    assert exact.equal_counts


def test_a_user_s_network_of_learned_steps_converts():
    model = nn.Sequential(
        conv_norm(3, 6, 3, bits=None), LsqNeuron(3), nn.MaxPool2d(2), conv_norm(6, 5, 3, bits=None), LsqNeuron(3),
        TokenMean(),
    ).double().eval()  # fmt: skip
    spiking = to_spike_driven(model)
    images = torch.randn(2, 3, 17, 16, dtype=torch.float64)
    torch.testing.assert_close(spiking.simulate(images).logits, model(images), rtol=1e-10, atol=1e-12)
