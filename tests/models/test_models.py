"""One contract test over everything registered, and the published numbers."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from qsd import QsdError
from qsd.layers import QuantConv2d, QuantLinear, TransformerBlock
from qsd.neurons import SpikeNeuron
from tests.helpers.networks import ALL_NAMES, sampled, small


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("qsd_8m", 8.337),
        ("qsd_15m", 15.117),
        ("qsd_31m", 31.340),
        ("qsd_55m", 55.359),
        ("qsd_75m", 74.663),
        ("qsd_124m", 123.754),
        # The papers truncate: 16.81, 29.68, 66.34; of CIFAR-10 4.15, 5.76, 9.32.
        ("csdformer_8_384", 16.816),
        ("csdformer_8_512", 29.689),
        ("csdformer_8_768", 66.339),
        ("csdformer_4_256", 4.152),
        ("csdformer_2_384", 5.763),
        ("csdformer_4_384", 9.320),
    ],
)
def test_parameter_counts_are_the_published_networks(name, millions):
    # Float parameters at 1000 classes (CIFAR models: at 10); step sizes are not counted.
    with torch.device("meta"):
        model = timm.create_model(name)
        twin = timm.create_model(f"{name}_ann")
    count = sum(p.numel() for n, p in model.named_parameters() if not n.endswith(".step"))
    assert count == pytest.approx(millions * 1e6, abs=500)
    assert sum(p.numel() for p in twin.parameters()) == count


def test_the_registry_holds_every_size_and_its_twin():
    assert {n.removesuffix("_ann") for n in ALL_NAMES} == {
        "qsd_8m", "qsd_15m", "qsd_31m", "qsd_55m", "qsd_75m", "qsd_124m", "qsd_tiny",
        "csdformer_8_384", "csdformer_8_512", "csdformer_8_768", "csdformer_4_256", "csdformer_2_384",
        "csdformer_4_384",
        "e_spikeformer_tiny", "e_spikeformer_5m", "e_spikeformer_10m", "e_spikeformer_19m", "e_spikeformer_83m",
        "e_spikeformer_171m",
    }  # fmt: skip
    assert len(ALL_NAMES) == 38


@pytest.mark.parametrize("name", sampled(ALL_NAMES))
def test_contract(name):
    # Three stages at least, and 24 channels in the last.
    sizes = {"in_chans": 2, **({"embed_dims": 24, "depth": 3} if name.startswith("csdformer") else {})}
    model = small(name, drop_path_rate=0.1, **sizes)
    images = torch.randn(2, 2, 48, 32)
    model.train()
    outputs = model(images)
    sum(output.square().sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    assert all(p.grad is not None for p in model.parameters()), "a dead parameter would stop distributed training"

    model.eval()
    with torch.no_grad():
        features = model.forward_features(images)
        logits = model(images)
        shapes = [(i["num_chs"], 48 // i["reduction"], 32 // i["reduction"]) for i in model.feature_info]
        assert features.shape == (2, *shapes[-1])
        assert logits.shape == (2, 5)
        torch.testing.assert_close(logits, model.forward_head(features))
        pooled = model.forward_head(features, pre_logits=True)
        if isinstance(model.get_classifier(), tuple):  # two heads, one of them behind a neuron
            assert pooled.shape == (2, model.num_features)
        else:
            torch.testing.assert_close(model.get_classifier()(pooled), logits)
        final, stages = model.forward_intermediates(images)
        assert torch.equal(final, features)
        assert [tuple(s.shape[1:]) for s in stages] == shapes
        assert torch.equal(
            model.forward_intermediates(images, indices=[1], intermediates_only=True, stop_early=True)[0], stages[1]
        )
        extractor = small(name, **sizes, features_only=True, out_indices=(0, 2)).eval()
        assert extractor.feature_info.channels() == [shapes[0][0], shapes[2][0]]
        extractor.model.load_state_dict(model.state_dict(), strict=False)
        for ours, theirs in zip(extractor(images), (stages[0], stages[2])):
            torch.testing.assert_close(ours, theirs)

    other = small(name, **sizes).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), logits)

    model.double()
    doubles = images.double()
    # float64, since convolutions choose their kernel by batch size
    torch.testing.assert_close(model(doubles)[:1], model(doubles[:1]), msg="a sample's output depends on its batch")
    model.float()

    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    model.reset_classifier(0)
    assert model(images).shape == (2, 24)
    assert model.prune_intermediate_layers([1]) == [1]
    assert model.forward_features(images).shape == (2, *shapes[1])
    stride = model.feature_info[1]["reduction"]
    least = model.forward_features(images[..., :stride, :stride])  # smaller images than before are legal
    assert least.shape == (2, shapes[1][0], 1, 1)


def test_features_are_those_of_the_published_stages():
    shapes = [(info["num_chs"], info["reduction"]) for info in small("qsd_15m").feature_info]
    assert shapes == [(8, 4), (8, 8), (16, 16), (24, 16)]
    assert {info["reduction"] for info in small("csdformer_8_384").feature_info} == {16}
    assert {info["reduction"] for info in small("csdformer_4_384").feature_info} == {4}
    default = timm.create_model("csdformer_8_384", embed_dims=24, num_heads=4, depth=2, features_only=True)
    assert len(default(torch.randn(1, 3, 32, 32))) == 1  # the last block's, whatever the depth


@pytest.mark.skipif(not hasattr(torch.onnx, "ops"), reason="exporting asks for PyTorch 2.8")
@pytest.mark.parametrize("name", ["qsd_tiny", "csdformer_4_256"])
def test_the_network_exports(name):
    model, images = small(name, depth=2).eval(), torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images))


@pytest.mark.parametrize("name", ["qsd_tiny", "csdformer_4_256"])
def test_gradient_checkpointing_is_bit_equal(name):
    model, images = small(name).train(), torch.randn(2, 3, 32, 32)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = []
    for enable in (False, True):
        model.load_state_dict(state)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()] + [b.clone() for b in model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_stochastic_depth_grows_linearly_over_both_stages():
    blocks = [m for m in small("qsd_tiny", depth=8, drop_path_rate=0.7).modules() if isinstance(m, TransformerBlock)]
    assert [b.drop_path_rate for b in blocks] == pytest.approx([0.1 * i for i in range(8)])


@pytest.mark.parametrize("name", ["qsd_tiny", "csdformer_4_256"])
def test_parameters_of_one_dimension_or_none_are_exempt_from_weight_decay(name):
    optimizer = create_optimizer_v2(small(name, depth=4), opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.7)
    decayed = [g for g in optimizer.param_groups if g["weight_decay"] > 0]
    exempt = [g for g in optimizer.param_groups if g["weight_decay"] == 0]
    assert all(p.dim() > 1 for g in decayed for p in g["params"])
    assert all(p.dim() <= 1 for g in exempt for p in g["params"])
    assert len({g["lr_scale"] for g in optimizer.param_groups}) >= 4  # groups by depth


def test_twins_have_the_same_topology_without_spikes_or_quantizers():
    # The arguments of a recipe for the spiking network make its twin too.
    spiking, twin = small("qsd_15m"), small("qsd_15m_ann", time_steps=4, weight_bits=4)
    assert not any(isinstance(m, SpikeNeuron) for m in twin.modules())
    assert not [k for k in twin.state_dict() if k.endswith("step")]
    assert {k for k in spiking.state_dict() if not k.endswith("step")} == set(twin.state_dict())
    layers = [m for m in spiking.modules() if isinstance(m, QuantConv2d | QuantLinear)]
    assert all(layer.quantizer.bits == 4 for layer in layers)
    assert small("qsd_15m_ann", attention="softmax")(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_csdformer_s_twin_has_the_same_topology_and_softmax_attention_on_demand():
    model = small("csdformer_8_384", weight_bits=4)
    twin = small("csdformer_8_384_ann", time_steps=4, weight_bits=4, activation="qcfs")
    assert not any(isinstance(m, SpikeNeuron) for m in twin.modules())
    assert {k for k in model.state_dict() if not k.endswith("step")} == set(twin.state_dict())
    assert {k for k in small("csdformer_8_384").state_dict() if "quantizer" in k} == set()
    assert small("csdformer_8_384", time_steps=0).state_dict().keys() == twin.state_dict().keys()
    assert small("csdformer_8_384_ann", attention="softmax")(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    layers = [m for m in model.modules() if isinstance(m, QuantConv2d | QuantLinear)]
    assert all(layer.quantizer.bits == 4 for layer in layers)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (33, 80)])
def test_csdformer_takes_any_size_and_shape_that_its_pools_allow(size):
    model = small("csdformer_8_384").eval()
    tokens = [-(-side // 16) for side in size]  # a pool of stride 2 rounds up
    assert model.forward_features(torch.randn(1, 3, *size)).shape[-2:] == tuple(tokens)
    assert model(torch.randn(1, 3, *size)).shape == (1, 5)


def test_csdformer_s_tokenizer_pools_spike_counts_and_the_head_sees_spikes():
    model = small("csdformer_4_256").train()
    pools = [m for m in model.modules() if isinstance(m, torch.nn.MaxPool2d)]
    assert [(p.kernel_size, p.stride, p.padding) for p in pools] == [(3, 2, 1)] * 2  # of CIFAR's four stages, the last
    seen = []
    for pool in pools:
        pool.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    model.head.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    model(torch.randn(2, 3, 32, 32))
    for spikes, neuron in zip(seen, (model.stem[3].neuron, model.stem[4].neuron, model.head_neuron)):
        counts = spikes / neuron.step
        assert set(counts.round(decimals=4).unique().tolist()) <= {0, 1, 2, 3, 4}
        assert counts.any()


def test_time_steps_and_bits_can_be_overridden():
    model = small("qsd_15m", time_steps=6, weight_bits=2).eval()
    assert {m.time_steps for m in model.modules() if isinstance(m, SpikeNeuron)} == {6}
    assert {m.quantizer.q_max for m in model.modules() if isinstance(m, QuantConv2d)} == {1}


def test_zero_asks_timm_for_float_weights_and_relus():
    # timm drops arguments that are None
    model = small("qsd_15m", time_steps=0, weight_bits=0)
    assert model.state_dict().keys() == small("qsd_15m_ann").state_dict().keys()
    assert model.time_steps is None
    assert model.weight_bits is None
    assert any(isinstance(m, SpikeNeuron) for m in small("qsd_15m", weight_bits=0).modules())


def test_smaller_strides_keep_more_tokens_of_small_images():
    model = small("qsd_tiny", strides=(1, 1, 2, 2, 1))
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape[-2:] == (8, 8)
    assert [info["reduction"] for info in model.feature_info] == [1, 2, 4, 4]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dims": (8, 8, 18, 24)}, r"embed_dims\[2\]=18 is not divisible by num_heads=4; pick a multiple of 4"),
        ({"embed_dims": (7, 8, 16, 24)}, "the first one even"),
        ({"embed_dims": (8, 8, 16)}, "four positive sizes"),
        ({"depth": 1}, "depth=1"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"strides": (2, 2)}, "five positive strides"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"weight_bits": 1}, "weight_bits=1"),
        ({"time_steps": -1}, "time_steps=-1"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"global_pool": "max"}, "only 'avg' exists"),
        ({"attention": "softmax"}, "not spike-driven"),
        ({"pretrained": True}, "no pretrained weights are distributed"),
    ],
)
def test_sizes_that_do_not_fit_together_are_named(kwargs, message):
    with pytest.raises(QsdError, match=message):
        small("qsd_tiny", **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dims": 24, "num_heads": 5}, r"24 channels are not divisible by num_heads=5"),
        ({"embed_dims": 20}, r"embed_dims=20 is no positive multiple of 8"),
        ({"embed_dims": (8, 8)}, r"embed_dims=\(8, 8\) is no positive multiple of 8"),
        ({"depth": 0}, "depth=0"),
        ({"strides": (2, 2)}, "four positive strides"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"activation": "gelu"}, "activation='gelu' is unknown; use 'lsq', 'qcfs' or 'relu'"),
        ({"attention": "linear"}, "attention='linear' is unknown; use 'nrelu' or 'softmax'"),
        ({"attention": "softmax"}, "not spike-driven"),
        ({"time_steps": 300}, "time_steps=300"),
        ({"weight_bits": 1}, "weight_bits=1"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"global_pool": "max"}, "only 'avg' exists"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"pretrained": True}, "none were published for CSDformer"),
    ],
)
def test_csdformer_names_what_does_not_fit(kwargs, message):
    with pytest.raises(QsdError, match=message):
        small("csdformer_8_384", **kwargs)


def test_images_that_are_too_small_or_of_other_channels_are_named():
    model = small("qsd_tiny")
    with pytest.raises(QsdError, match="15x40 pixels are smaller than the network's total stride 16"):
        model(torch.randn(1, 3, 15, 40))
    with pytest.raises(QsdError, match="1 channels, the network expects in_chans=3"):
        model(torch.randn(1, 1, 32, 32))


@pytest.mark.parametrize("name", ["qsd_tiny", "csdformer_4_256"])
def test_half_precision_autocast_trains(name):
    model = small(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 32, 32)).float().square().sum()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_small_scales_of_branches_and_norms_keep_membranes_within_the_window():
    shares = {}
    for scale, norms in ((1.0, 1.0), (0.2, 1.0), (0.4, 0.5)):
        torch.manual_seed(0)
        sizes = {"depth": 2, "strides": (2, 1, 1, 1, 1), "branch_scale": scale, "norm_scale": norms}
        model = timm.create_model("qsd_tiny", **sizes).train()
        membranes = []
        neuron = model.stages[2].downsample.neuron
        neuron.register_forward_hook(lambda _neuron, inputs, _output, found=membranes: found.append(inputs[0]))
        model(torch.randn(8, 3, 16, 16))
        positive = membranes[0][membranes[0] > 0]
        shares[scale] = (positive < 1).float().mean().item()
    assert shares[0.2] > 0.6, "about 0.68 of a half normal distribution of variance 1 are below 1"
    assert shares[0.4] > 0.8, "about 0.88 of one of variance 0.41: a norm of 0.25 and four branches of 0.04"
    assert shares[1.0] < 0.5
