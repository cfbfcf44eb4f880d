"""E-SpikeFormer: the published code's numbers, its sizes, its checkpoints, and what conversion keeps."""

import argparse
import json
import logging
from collections import Counter

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

from qsd import QsdError, audit_spike_driven, load_reference_weights, measure_energy, to_spike_driven
from qsd.distillation import Teacher
from qsd.information import measure_information
from qsd.layers.e_spikeformer import ESpikeBlock
from qsd.models.e_spikeformer_names import BASE_CODE, LARGE_CODE
from qsd.models.reference import is_reference
from tests.helpers import DATA, sample
from tests.helpers.networks import assert_same_counts, dense_network, randomize_norms, small
from tests.helpers.published_e_spikeformer import PublishedLarge, published_state


@pytest.fixture(scope="module")
def ties():
    """Numbers of the published base network, in which many attention products lie exactly between two counts.

    The plain names are the published rounding's, ``half_up.*`` this package's. Of every gradient there are two numbers,
    by its published name's place in the alphabet: the sum of its entries times ``cos(0), cos(1), ...``, and its norm.
    """
    with safe_open(DATA / "e_spikeformer_ties.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def state_of(tensors):
    return {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}


def base_model(config, **options):
    sizes = {key: config[key] for key in ("embed_dims", "num_heads", "mlp_ratio", "num_classes")}
    return timm.create_model("e_spikeformer_5m", **sizes, weight_bits=0, **options).double()


def assert_near(ours, published):
    assert (ours - published).abs().max() <= 1e-9 * max(1.0, published.abs().max())


@pytest.mark.parametrize(("prefix", "options"), [("", {"rounding": "half_even"}), ("half_up.", {})])
def test_logits_stages_and_every_gradient_are_the_published_code_s(ties, prefix, options):
    config, tensors = ties
    model, images = base_model(config, **options), tensors["input"]
    load_reference_weights(model, state_of(tensors))
    model.eval()
    with torch.no_grad():
        assert_near(model(images), tensors[f"{prefix}eval.logits"])
        assert_near(model.stem(images), tensors[f"{prefix}eval.stem"])
        for i, stage in enumerate(model.forward_intermediates(images, intermediates_only=True)):
            assert_near(stage, tensors[f"{prefix}eval.stage{i + 1}"])
    logits = model.train()(images)
    assert_near(logits.detach(), tensors[f"{prefix}train.logits"])
    (logits * tensors["train.weight"]).sum().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    # Names of parameters in the published code, in its alphabet, and ours for each.
    published = sorted(n for n in state_of(tensors) if not n.endswith(("running_mean", "running_var", "tracked")))
    names = [next(iter(BASE_CODE.convert({name: torch.zeros(1)}))) for name in published]
    assert set(names) == ours.keys()
    for name, (projection, norm) in zip(names, tensors[f"{prefix}train.grads"], strict=True):
        gradient = ours[name].flatten()
        weights = torch.cos(torch.arange(len(gradient), dtype=torch.float64))
        assert abs((gradient * weights).sum() - projection) <= 1e-9 * max(1, norm), name
        assert abs(gradient.norm() - norm) <= 1e-9 * max(1, norm), name


def large(**options):
    model = timm.create_model(
        "e_spikeformer_83m", embed_dims=(8, 12, 20), depth=2, num_heads=2, num_classes=7, layer_scale=0.5, **options
    )
    randomize_norms(model, mean=(0, 0.3), var=(0.3, 1), bias=(0.6, 0.5))
    return model.double()


@pytest.mark.parametrize("levels", [4, 8])
def test_both_heads_and_every_gradient_of_the_large_network_are_the_published_ones(levels):
    model, images = large(time_steps=levels), torch.randn(2, 3, 48, 64, dtype=torch.float64)
    state = published_state(model)
    assert {"ConvBlock1_1.0.conv1.0.0.weight", "block3.1.attn.v_conv.0.conv2.1.bias", "head_kd.bias"} <= state.keys()
    with torch.no_grad():
        pair = PublishedLarge(state, 2, levels, training=False)(images)
        assert_near(model.eval()(images), (pair[0] + pair[1]) / 2)
    parameters = dict(model.named_parameters())
    leaves = {name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in state.items()}
    expected = PublishedLarge(leaves, 2, levels, training=True)(images)
    logits = model.train()(images)
    for ours, published in zip(logits, expected, strict=True):
        assert_near(ours.detach(), published.detach())
    weights = torch.randn(2, 2, 7, dtype=torch.float64)
    for outputs in (logits, expected):
        sum((output * weight).sum() for output, weight in zip(outputs, weights)).backward()
    gradients = LARGE_CODE.convert({name: t.grad for name, t in leaves.items() if t.grad is not None})
    assert gradients.keys() == parameters.keys()
    for name, parameter in parameters.items():
        # A bias in front of a norm has no gradient but for rounding, which is relative to the others in its chain.
        chain = f"{name.rpartition('.')[0].rpartition('.')[0]}."
        scale = max(float(g.abs().max()) for other, g in gradients.items() if other == name or other.startswith(chain))
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-9 * max(1.0, scale), name


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("tiny", {}, 2_702_048),
        ("5m", {}, 5_105_608),
        ("10m", {}, 10_023_112),
        ("19m", {}, 18_987_504),
        ("19m", {"embed_dims": (80, 160, 320, 440)}, 29_067_920),
        ("83m", {}, 76_699_920),
        ("83m", {"distilled": False}, 76_186_920),
        ("171m", {}, 171_740_714),
        ("171m", {"distilled": False}, 170_971_714),
    ],
)
def test_parameter_counts_are_the_published_networks(name, options, parameters):
    with torch.device("meta"):
        model = timm.create_model(f"e_spikeformer_{name}", **options)
        twin = timm.create_model(f"e_spikeformer_{name}_ann", **options)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in twin.parameters()) == parameters
    assert not [m for m in twin.modules() if type(m).__name__ == "SpikeNeuron"]


def test_the_base_network_is_spike_driven_without_merging_and_takes_295_steps():
    model = dense_network("e_spikeformer_tiny", depth=8)
    spiking = to_spike_driven(model, merge="none")
    assert spiking.latency() == 4 + 89 * 3 + 8 * 3 == 295
    audit = audit_spike_driven(spiking, torch.randn(1, 3, 48, 48, dtype=torch.float64))
    found = Counter((o.operation, "stem" if o.stem else o.status) for o in audit.operations if o.operation != "product")
    assert found == {("convolution", "stem"): 1, ("convolution", "binary"): 96, ("linear", "binary"): 1}
    assert len([o for o in audit.operations if o.operation == "product" and o.status in ("binary", "integer")]) == 16
    audit.check()
    assert len(spiking.neurons()) == 105
    assert not any(chain.merged for chain in to_spike_driven(model, merge="all").chains().values())


def test_the_large_network_is_spike_driven_but_for_its_first_head_and_merges_into_a_smaller_one():
    model, images = small("e_spikeformer_83m", depth=12), torch.randn(1, 3, 48, 48)
    randomize_norms(model.eval(), mean=(0, 0.3), var=(0.3, 1), bias=(0.6, 0.5))
    spiking = to_spike_driven(model)
    assert spiking.latency() == 4 + 72 * 3 + 12 * 3 == 256
    audit = audit_spike_driven(spiking, images)
    wrong = [o for o in audit.operations if not (o.spike_driven or o.stem or o.status == "unproven")]
    assert [o.name for o in wrong] == ["head"]
    with pytest.raises(QsdError, match=r"1 of 110 operations are not spike-driven: head \(linear\)"):
        audit.check()
    (head,) = [layer for layer in measure_energy(spiking, images, progress=False).layers if layer.name == "head"]
    assert head.macs["merged"] == head.macs["integer"] == 24 * 5  # it multiplies
    assert head.additions["merged"] == 0
    pairs = [chain for chain in spiking.chains().values() if chain.merged is not None]
    assert len(pairs) == 48
    for chain in pairs:
        channels = chain.merged.weight.shape[0]
        assert chain.merged.weight.numel() == channels**2
        assert sum(factor.weight.numel() for factor in chain.convolutions.values()) == 3 * channels**2
    mended = dense_network("e_spikeformer_83m", spiking_head=True)
    audit_spike_driven(to_spike_driven(mended), images.double()).check()


@pytest.mark.parametrize("rounding", sample(["half_even"], ["half_up", "half_even"]))
@pytest.mark.parametrize("time_steps", sample([4], [1, 2, 4, 8]))
def test_both_networks_convert_without_a_changed_count_at_odd_sizes(time_steps, rounding):
    # With 4 channels to a head, products lie exactly between two counts.
    for name, options in (("tiny", {"embed_dims": (8, 8, 16, 16)}), ("83m", {})):
        model = dense_network(f"e_spikeformer_{name}", time_steps=time_steps, rounding=rounding, **options)
        images = torch.randn(2, 3, 41, 50, dtype=torch.float64)
        for code in ("unary", "binary") if time_steps == 4 else ("unary",):
            spiking = to_spike_driven(model, merge="none" if name == "tiny" else "all", code=code)
            assert_same_counts(model, spiking, images)


def test_images_in_a_row_fire_counts_that_are_rounded_to_even():
    model = dense_network("e_spikeformer_tiny", embed_dims=(8, 8, 16, 16), depth=2, time_steps=2, rounding="half_even")
    images, ties = torch.randn(2, 3, 48, 48, dtype=torch.float64), []
    stream = to_spike_driven(model).stream([images[:1], images[1:]])
    for name, module in model.named_modules():
        if name.endswith("attn_neuron"):
            module.register_forward_hook(lambda m, i, _: ties.append((m.drive(*i) % 1 == 0.5).sum()))
    torch.testing.assert_close(torch.cat(stream.logits), model(images), rtol=1e-10, atol=1e-12)
    assert sum(ties) > 0


def test_both_layouts_are_read_from_files_with_their_arguments_and_told_from_qsd_s(ties, tmp_path, caplog):
    config, tensors = ties
    assert not is_reference(state_of(tensors))
    sizes = BASE_CODE.sizes(state_of(tensors))
    assert sizes["embed_dims"] == tuple(config["embed_dims"])
    assert (sizes["depth"], sizes["mlp_ratio"], sizes["value_ratio"], sizes["num_classes"]) == (8, 4, 4, 5)
    published = large()
    state = published_state(published)
    for i in range(2):  # layers that never ran, of shapes that do not fit each other
        state[f"block3.{i}.rep_conv.conv1.0.weight"] = torch.zeros(20, 20, 1)
        state[f"block3.{i}.rep_conv.conv1.1.weight"] = torch.zeros(30)
    path = tmp_path / "83M-1x8_83_6.pth"
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(model="spikformer12_512")}, path)
    model, images = large(time_steps=4), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        load_reference_weights(model, path)
    assert [record.getMessage().split(" are ")[0] for record in caplog.records[1:]] == ["4 tensors of 'rep_conv'"]
    assert "the name of" in caplog.records[0].getMessage()
    assert "tells T = 8, and the model has T = 4" in caplog.records[0].getMessage()
    assert torch.equal(model.eval()(images), published.eval()(images))
    with pytest.raises(QsdError, match="does not fit the model"):
        load_reference_weights(base_model(config), path)


def test_heads_of_another_number_of_classes_start_anew_and_a_single_head_drops_the_second(caplog):
    state = published_state(large())
    for name, options in (("83m", {"num_classes": 3}), ("83m", {"distilled": False, "num_classes": 7})):
        model = timm.create_model(f"e_spikeformer_{name}", embed_dims=(8, 12, 20), depth=2, num_heads=2, **options)
        load_reference_weights(model, state)
        torch.testing.assert_close(
            model.stem.downsample.proj.conv.weight.double(), state["downsample1_1.encode_conv.weight"]
        )
    assert caplog.text.count("no classifier for 3 classes") == 2


def test_stochastic_depth_grows_over_both_stages_and_drops_whole_branches():
    model = small("e_spikeformer_tiny", depth=8, drop_path_rate=0.7)
    blocks = [m for m in model.modules() if isinstance(m, ESpikeBlock)]
    assert [b.drop_path_rate for b in blocks] == pytest.approx([0.1 * i for i in range(8)])
    blocks[-1].drop_path_rate = 1 - 1e-12
    x = torch.randn(3, 24, 4, 4)
    assert torch.equal(blocks[-1].train()(x), x)


def test_a_head_of_two_can_train_alone_and_its_average_is_evaluated():
    model, images = large(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    first, second = model.train()(images)
    model.set_distilled_training(False)
    torch.testing.assert_close(model(images), (first + second) / 2)
    assert len(model.get_classifier()) == 2
    assert all(isinstance(head, nn.Linear) for head in model.get_classifier())


def test_attention_of_wider_values_is_analysed_and_compared_with_a_teacher():
    sizes = {"depth": 4, "strides": (1, 2, 2, 2, 1)}
    network = dense_network("e_spikeformer_tiny", **sizes).float()
    teacher = Teacher(small("e_spikeformer_tiny_ann", **sizes), "twin")
    batches = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    signals = measure_information(network, batches, teacher).to_dict()["signals"]
    assert len(signals) == 3 * 4
    assert all(0 < signal["teacher_distance"] < 2 for signal in signals)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tiny", {"embed_dims": (8, 8, 16)}, "four positive sizes"),
        ("83m", {"embed_dims": (8, 8, 16, 16)}, "three positive sizes"),
        ("83m", {"strides": (2, 2)}, "four positive strides"),
        ("83m", {"depth": 0}, "depth=0"),
        ("tiny", {"value_ratio": 0}, "value_ratio=0"),
        ("tiny", {"rounding": "even"}, "rounding='even' is unknown; use 'half_up' or 'half_even'"),
        ("tiny_ann", {"window": "shut"}, "window='shut' is unknown"),
        ("tiny", {"pretrained": True}, "Spike-Driven-Transformer-V3"),
    ],
)
def test_sizes_that_do_not_fit_together_are_named(name, options, message):
    with pytest.raises(QsdError, match=message):
        small(f"e_spikeformer_{name}", **options)
