"""Memory-lean training against ordinary layers: the same gradients, from less."""

import copy
import weakref

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import qsd
from qsd import functional, set_lean
from qsd.errors import QsdError
from qsd.layers import (
    LinearChain,
    NReluSelfAttention,
    QuantConv2d,
    QuantLinear,
    SpikeDrivenSelfAttention,
    SpikeMaxPool2d,
    conv_norm,
    quantized_weight,
    rep_conv,
)
from qsd.layers.quantized import lean_form
from qsd.lean import exact_matmul, fixed_spikes, switch
from qsd.lean.operands import layout_of
from qsd.neurons import LsqNeuron, QcfsNeuron, SpikeNeuron
from qsd.recurrence import FrameMemory
from tests.helpers import sample
from tests.helpers.networks import randomize_norms

SMALL_QSD = {"embed_dims": (8, 8, 16, 16), "num_heads": 2, "depth": 4, "layer_scale": 0.5, "num_classes": 5}
SMALL_CSD = {"embed_dims": 16, "num_heads": 2, "depth": 2, "num_classes": 5}


def trained(model, images, lean, autocast=False, backend=None):
    """Output, gradients and buffers after one backward pass through a copy, compiled or not."""
    model = copy.deepcopy(model)
    set_lean(model, lean)
    if backend is not None:
        torch._dynamo.reset()
        model.compile(backend=backend, fullgraph=True)
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(images)
    weight = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).sin().view(output.shape)
    (output * weight.to(torch.promote_types(output.dtype, torch.float32))).sum().backward()
    named = {"output": output.detach(), "input": images.grad, **dict(model.named_buffers())}
    return named | {name: p.grad for name, p in model.named_parameters()}


def assert_same(model, images, **arguments):
    plain, lean = (trained(model, images, on, **arguments) for on in (False, True))
    for name, value in plain.items():
        assert torch.equal(value, lean[name]), name


def assert_close(model, images, tolerance=1e-11):
    plain, lean = (trained(model, images, on) for on in (False, True))
    for name, value in plain.items():
        torch.testing.assert_close(value, lean[name], rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023


def kept(function, *own):
    """Bytes of the storages that a forward pass keeps for the backward pass, beside those of the given tensors."""
    known = {t.untyped_storage().data_ptr() for t in own}
    sizes, held = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor.detach())  # or its address would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(sizes.values())


def kept_by(model, images):
    return kept(lambda: model(images), images, *model.parameters(), *model.buffers())


# -- bit by bit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("time_steps", [1, 4, 6, 7, 8, 127, 200])  # 4 bits up to 7, 8 bits up to 127, none above
@pytest.mark.parametrize(
    "layer",
    [
        QuantConv2d(6, 8, 3, stride=2, padding=1, bias=True),
        QuantConv2d(6, 6, 3, padding=1, groups=6),
        QuantConv2d(6, 4, 1, groups=2, bias=True, weight_bits=None),
        QuantConv2d(6, 9, 5, stride=3, padding=2, groups=3, weight_bits=2),
    ],
    ids=["strided", "depthwise", "float pointwise", "grouped"],
)
def test_gradients_of_a_convolution_behind_a_neuron_are_the_same_bits(dtype, channels_last, time_steps, layer):
    images = torch.randn(3, 6, 7, 9, dtype=dtype)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    images[0, :, 0] = 0  # exactly at the lower threshold of the gradient
    images[1, :, 1] = 1  # and at the upper one
    assert_same(nn.Sequential(SpikeNeuron(time_steps), copy.deepcopy(layer)).to(dtype), images)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (1, 6)])
def test_gradients_of_a_linear_layer_behind_a_neuron_are_the_same_bits(autocast, shape):
    for layer in (QuantLinear(6, 5), QuantLinear(6, 5, bias=False, weight_bits=None)):
        assert_same(nn.Sequential(SpikeNeuron(3), layer), torch.randn(shape), autocast=autocast)


def test_autocast_computes_in_half_precision_and_gives_the_same_bits():
    model = nn.Sequential(SpikeNeuron(6), conv_norm(4, 8, 3, bias=True), SpikeNeuron(6), QuantConv2d(8, 4, 1))
    images = torch.randn(2, 4, 6, 6)
    assert trained(model, images, True, autocast=True)["output"].dtype == torch.bfloat16
    assert_same(model, images, autocast=True)


@pytest.mark.parametrize("neuron", [SpikeNeuron(4), SpikeNeuron(3, threshold=36.0, amplitude=2 / 3)])
def test_gradients_through_a_max_pool_are_the_same_bits(neuron):
    pool, images = SpikeMaxPool2d(3, 2, padding=1), torch.randn(2, 4, 9, 7)
    assert_same(nn.Sequential(neuron, pool), images * (1 if neuron.threshold < 2 else 100))
    assert_same(nn.Sequential(neuron, pool, QuantConv2d(4, 3, 1)), images)


def test_a_max_pool_of_spikes_is_that_of_torch_for_every_geometry():
    random = np.random.default_rng(0)
    for _ in range(200):
        kernel, stride, dilation = (random.integers(1, most, 2, endpoint=True).tolist() for most in (5, 4, 3))
        padding, ceil = [int(random.integers(0, side // 2 + 1)) for side in kernel], bool(random.integers(2))
        span = max((side - 1) * tap + 1 for side, tap in zip(kernel, dilation))
        x = torch.randint(0, 5, (2, 3, *random.integers(span, span + 9, 2).tolist())).float()
        expected = F.max_pool2d(x, kernel, stride, padding, dilation, ceil)
        got = SpikeMaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil)(SpikeNeuron(4, 1.0)(x.requires_grad_()))
        assert torch.equal(got, expected), (kernel, stride, padding, dilation, ceil, x.shape)


def test_a_max_pool_follows_a_learned_step():
    model = nn.Sequential(LsqNeuron(4), SpikeMaxPool2d(3, 2, padding=1), QuantConv2d(4, 3, 1)).double()
    assert_close(model, torch.randn(2, 4, 9, 7, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_through_time_are_the_same_bits(dtype):
    images = torch.randn(6, 4, 5, 5, dtype=dtype)
    images[0, :, 0], images[2, :, 1] = 0, 1
    for neuron in (SpikeNeuron(4), SpikeNeuron(3, 2.0, 0.7), SpikeNeuron(4, rounding="half_even"), SpikeNeuron(200)):
        for frames, decay in ((3, 0.5), (2, 1.0), (1, 0.5)):
            neuron.memory = FrameMemory(frames, decay)
            assert_same(nn.Sequential(neuron, QuantConv2d(4, 3, 3)).to(dtype), images)
    learned = LsqNeuron(4)
    learned.memory = FrameMemory(3, 0.5)
    assert_close(nn.Sequential(learned, QuantConv2d(4, 3, 3)).double(), images.double())


def test_gradients_of_products_of_spikes_are_the_same_bits():
    query, key = (torch.randn(2, 6, 4, 5) for _ in range(2))
    results = []
    for lean in (False, True):
        inputs = [t.clone().requires_grad_() for t in (query, key)]
        fire = fixed_spikes if lean else functional.fixed_spikes
        left, right = (fire(t, 4, None, 1.0).reshape(2, 2, 3, 20) for t in inputs)
        product = exact_matmul(left.transpose(-1, -2), right)
        product.sin().sum().backward()
        results.append([product, *(t.grad for t in inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_checkpointed_blocks_give_the_same_bits():
    model = timm.create_model("qsd_tiny", **SMALL_QSD).train()
    images = torch.randn(2, 3, 32, 32)
    once = trained(model, images, True)
    model.set_grad_checkpointing()
    again = trained(model, images, True)
    assert all(torch.equal(value, again[name]) for name, value in once.items())


# -- up to rounding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neuron", [LsqNeuron(4), LsqNeuron(9), QcfsNeuron(4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_learned_step_s_gradient_follows_from_what_the_norm_in_front_keeps(neuron, channels_last):
    model = nn.Sequential(conv_norm(3, 6, 3), neuron, conv_norm(6, 4, 1)).double().train()
    model[0].norm.weight.data.uniform_(0.5, 2)
    model[0].norm.bias.data.normal_()
    images = torch.randn(3, 3, 8, 6, dtype=torch.float64)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    assert_close(model, images)


def test_a_learned_step_behind_a_norm_keeps_nothing_but_codes():
    model = nn.Sequential(conv_norm(3, 8, 3), LsqNeuron(4)).train()
    images = torch.randn(2, 3, 8, 6)
    inputs, vectors = 2 * 8 * 48 * 4, 2 * 8 * 4  # the norm's input; its mean and deviation
    assert kept_by(model, images) == inputs + vectors + 2 * 8 * 48 // 2
    x = images.clone().requires_grad_()  # elsewhere, the input itself
    assert kept(lambda: model[1](x), x, model[1].step) == images.numel() // 2


def randomized(chain, momentum=0.1):
    for norm in randomize_norms(chain, weight=(0.01, 2)).modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = momentum
    return chain.double().train()


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # at 1e-3 the variance is comparable with eps
def test_a_rep_conv_s_norms_run_as_one_with_all_parameters_and_statistics(momentum, scale):
    assert_close(randomized(rep_conv(6), momentum), scale * torch.randn(3, 6, 5, 4, dtype=torch.float64))


def test_a_chain_scales_its_output_within_the_last_norm():
    for chain in (rep_conv(6, layer_scale=1.0), conv_norm(6, 6, 1, layer_scale=1.0)):
        model = randomized(chain)
        model.layer_scale.gamma.data.normal_()
        assert_close(model, torch.randn(3, 6, 5, 4, dtype=torch.float64))


def test_norms_of_one_value_are_refused_as_by_torch():
    for chain in (rep_conv(4), conv_norm(4, 4, 1)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            chain.train()(torch.randn(1, 4, 1, 1))


def test_hooks_on_norms_and_convolutions_see_what_they_do_in_ordinary_chains():
    chain, images = randomized(rep_conv(4)), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for names in (["norm1"], ["norm2"], ["norm_pad"], ["norm_pad.norm"], ["depthwise"], ["pointwise2"], ["pointwise1"]):
        seen = []
        for lean in (False, True):
            model = copy.deepcopy(chain)
            set_lean(model, lean)
            for name in names:
                model.get_submodule(name).register_forward_hook(lambda m, i, o, seen=seen: seen.append((i[0], o)))
            model(images)
        plain, lean = seen
        torch.testing.assert_close(plain, lean, rtol=0, atol=1e-12)


def test_synchronised_norms_stay_themselves():
    chain = nn.SyncBatchNorm.convert_sync_batchnorm(randomized(rep_conv(4)))
    # Without a process group they compute as ordinary norms do.
    assert_same(chain, torch.randn(2, 4, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("qsd_tiny", SMALL_QSD), ("csdformer_2_384", SMALL_CSD), ("csdformer_2_384", SMALL_CSD | {"weight_bits": 4})],
)
def test_whole_networks_have_the_same_gradients_and_statistics(name, sizes):
    model = timm.create_model(name, **sizes).double().train()
    assert_close(model, torch.randn(3, 3, 32, 32, dtype=torch.float64), tolerance=1e-9)


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_neuron_and_convolution_share_half_a_byte_per_element():
    conv = QuantConv2d(6, 4, 3, padding=1)
    images = torch.randn(2, 6, 8, 8, requires_grad=True)
    model = nn.Sequential(SpikeNeuron(7), conv)
    assert kept_by(model, images) == images.numel() // 2
    assert kept_by(nn.Sequential(SpikeNeuron(15), conv), images) == images.numel()
    model[0].memory = FrameMemory(2, 0.5)  # and its remainders over frames need nothing else
    assert kept_by(model, images) == images.numel() // 2
    set_lean(model, False)  # floats, the mask, the quantized weights
    assert kept_by(model, images) == images.numel() * 5 + conv.weight.numel() * 4


def test_attention_keeps_codes_in_place_of_its_operands():
    images = torch.randn(2, 16, 6, 6, requires_grad=True)
    for attention in (SpikeDrivenSelfAttention(16, 2), NReluSelfAttention(16, 2)):
        plain = copy.deepcopy(attention)
        set_lean(plain, False)
        assert kept_by(attention.train(), images) < 0.5 * kept_by(plain.train(), images)


@pytest.mark.parametrize(("name", "of_twin"), [("qsd_15m", 0.8), ("csdformer_8_384", 0.75)])
def test_a_network_keeps_less_than_its_float_twin_and_half_of_ordinary_layers(name, of_twin):
    # Smaller images than the 224 pixels of the targets: fewer tokens, and a larger share of what is no activation.
    images = torch.randn(1, 3, 96, 96)
    lean, plain, twin = (timm.create_model(n, num_classes=10).train() for n in (name, name, f"{name}_ann"))
    set_lean(plain, False)
    kept_lean = kept_by(lean, images)
    assert kept_lean <= 0.55 * kept_by(plain, images)
    assert kept_lean <= of_twin * kept_by(twin, images)


def test_no_float_stays_alive_behind_the_codes():
    outputs = []
    for attention in (SpikeDrivenSelfAttention(16, 2), NReluSelfAttention(16, 2)):
        for module in attention.modules():
            if isinstance(module, SpikeNeuron):
                module.register_forward_hook(lambda m, i, o: outputs.append(weakref.ref(o)))
        result = attention.train()(torch.randn(2, 16, 4, 4, requires_grad=True))
        assert result.requires_grad
    assert len(outputs) == 11
    assert all(output() is None for output in outputs)


def test_evaluation_makes_no_codes():
    neuron, x = SpikeNeuron(4), torch.randn(2, 3)
    with torch.no_grad():
        assert layout_of(neuron(x)) is None


def test_what_was_changed_since_it_left_the_neuron_is_kept_as_it_is():
    class Changed(nn.Module):
        def forward(self, x):
            return x.mul_(1.5)

    def change(module, inputs, output):
        return output * 1.5

    conv = QuantConv2d(3, 4, 1)
    hooked = nn.Sequential(SpikeNeuron(4), conv)
    hooked[0].register_forward_hook(change)
    for model in (
        nn.Sequential(SpikeNeuron(4), Changed(), conv),
        hooked,
        nn.Sequential(SpikeNeuron(4), nn.ReLU(), conv),
    ):
        assert_same(model, torch.randn(2, 3, 4, 4))


def test_differentiating_twice_is_refused():
    for model in (
        nn.Sequential(SpikeNeuron(4), QuantConv2d(3, 4, 1)),
        nn.Sequential(LsqNeuron(4), QuantConv2d(3, 4, 1)),
        rep_conv(3).train(),
    ):
        x = torch.rand(2, 3, 4, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


# -- compilation ------------------------------------------------------------------------------------------------------


COMPILED = [("qsd_tiny", SMALL_QSD | {"depth": 2}), ("csdformer_2_384", SMALL_CSD | {"depth": 1})]


@pytest.mark.parametrize(("name", "sizes"), sample(COMPILED[1:], COMPILED))
def test_networks_compile_without_breaks_and_once_more_for_a_last_smaller_batch(name, sizes):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    model = timm.create_model(name, **sizes).train()
    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    for epoch in range(2):
        for batch in (3, 3, 2):
            images = torch.randn(batch, 3, 32, 32)
            loss = F.cross_entropy(compiled(images), torch.zeros(batch, dtype=torch.long))
            loss.backward()
            if epoch == 0 and len(graphs) == 1:  # as the eager network's
                torch.testing.assert_close(loss, F.cross_entropy(model(images), torch.zeros(batch, dtype=torch.long)))
        assert len(graphs) <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    "attention", sample([SpikeDrivenSelfAttention], [SpikeDrivenSelfAttention, NReluSelfAttention])
)
def test_gradients_of_compiled_training_are_those_of_eager_training(attention):
    layers = conv_norm(3, 6, 3), LsqNeuron(4), conv_norm(6, 4, 1), SpikeNeuron(4), attention(4, num_heads=2)
    model = nn.Sequential(*layers, QcfsNeuron(4), QuantConv2d(4, 2, 1, bias=True)).double().train()
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    eager = trained(model, images, True)
    for name, value in trained(model, images, True, backend="aot_eager").items():
        torch.testing.assert_close(value, eager[name], rtol=1e-9, atol=1e-11)


# -- weights in evaluation --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_are_quantized_once_in_evaluation_until_something_changes():
    for layer in (QuantConv2d(3, 4, 3).eval(), QuantLinear(3, 4).eval()):
        first = quantized_weight(layer)
        assert quantized_weight(layer) is first
        changes = {
            "weights": lambda layer=layer: layer.weight.add_(0.3),
            "steps": lambda layer=layer: layer.quantizer.step.mul_(1.1),
            "a state dict": lambda layer=layer: layer.load_state_dict(
                {k: v * 2 for k, v in layer.state_dict().items()}
            ),
            "other parameters": lambda layer=layer: setattr(layer, "weight", nn.Parameter(layer.weight * 3)),
            "a mode": lambda layer=layer: (layer.weight.data.mul_(0.5), layer.train().eval()),
            "a type": lambda layer=layer: layer.double(),
        }
        for what, change in changes.items():
            before = quantized_weight(layer)
            change()
            after = quantized_weight(layer)
            assert after is not before, what
            assert torch.equal(after, layer.quantizer(layer.weight)), what
        assert quantized_weight(layer.train()) is not quantized_weight(layer)


def test_copies_checkpoints_and_gradients_know_nothing_of_kept_weights():
    layer = QuantConv2d(3, 4, 3).eval()
    with torch.no_grad():
        kept_weight = quantized_weight(layer)
        twin = copy.deepcopy(layer)
        twin.weight.mul_(2)
        assert torch.equal(quantized_weight(twin), twin.quantizer(twin.weight))
    assert set(layer.state_dict()) == {"weight", "quantizer.step"}
    assert quantized_weight(layer) is not kept_weight
    assert quantized_weight(layer).requires_grad
    reference = weakref.ref(layer)
    del layer
    assert reference() is None


def test_the_switch_reaches_every_layer():
    model = timm.create_model("qsd_tiny", **SMALL_QSD)
    set_lean(model, False)
    kinds = (SpikeNeuron, QuantConv2d, QuantLinear, LinearChain)
    assert not any(m.lean for m in model.modules() if isinstance(m, kinds))
    set_lean(model)
    assert all(m.lean for m in model.modules() if isinstance(m, kinds))


@pytest.mark.parametrize(("device", "setting", "lean"), [
    ("cpu", "auto", True), ("cuda", "auto", False), ("cpu", False, False), ("cuda", True, True),
])  # fmt: skip
def test_by_default_layers_train_lean_on_every_device_but_cuda(device, setting, lean, monkeypatch):
    monkeypatch.setattr(functional, "fixed_spikes", lambda *_: False)
    monkeypatch.setattr(qsd.lean, "fixed_spikes", lambda *_: True)
    layer, neuron = QuantConv2d(3, 4, 1), SpikeNeuron(4)
    assert layer.lean == neuron.lean == "auto"
    set_lean(nn.Sequential(layer, neuron), setting)
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 4, device=device)
    assert (lean_form(layer, x) is not None) == lean
    assert neuron(x) == lean


def test_by_default_small_tensors_are_left_to_ordinary_layers(monkeypatch):
    layer, neuron, x = QuantConv2d(3, 4, 1), SpikeNeuron(4), torch.randn(2, 3, 4, 4, requires_grad=True)
    for smallest, setting, lean in ((96, "auto", True), (97, "auto", False), (97, True, True)):
        monkeypatch.setattr(switch, "SMALLEST", smallest)
        set_lean(nn.Sequential(layer, neuron), setting)
        assert (lean_form(layer, x) is not None) == lean
        assert (layout_of(neuron(x)) is not None) == lean


@pytest.mark.parametrize("smallest", [500, 2000])
def test_networks_of_small_and_large_tensors_have_the_gradients_of_ordinary_layers(smallest, monkeypatch):
    monkeypatch.setattr(switch, "SMALLEST", smallest)
    model = timm.create_model("qsd_tiny", **SMALL_QSD | {"depth": 2}).double().train()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain, sizes = trained(model, images, False), {True: [], False: []}
    for neuron in (m for m in model.modules() if isinstance(m, SpikeNeuron)):
        neuron.register_forward_hook(lambda m, i, o: sizes[layout_of(o) is not None].append(o.numel()))
    mixed = trained(model, images, "auto")
    for name, value in plain.items():
        torch.testing.assert_close(value, mixed[name], rtol=1e-9, atol=1e-9, msg=lambda m: f"{name}: {m}")  # noqa: B023
    assert min(sizes[True]) >= smallest > max(sizes[False])


def test_an_unknown_setting_is_refused():
    with pytest.raises(QsdError, match="lean='on' is unknown; use 'auto', true or false"):
        set_lean(SpikeNeuron(4), "on")
