"""Chains, attention, blocks and recomputation."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qsd import QsdError
from qsd.layers import (
    BatchNormPad2d,
    ConvBlock,
    SpikeDrivenSelfAttention,
    TransformerBlock,
    quantized_weight,
    recompute,
    rep_conv,
)
from qsd.neurons import SpikeNeuron
from tests.helpers.networks import randomize_norms


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 7)])
def test_rep_conv_is_one_zero_padded_3x3_convolution_borders_included(size):
    chain = randomize_norms(rep_conv(6)).double().eval()
    first, depthwise, second = (
        quantized_weight(chain.get_submodule(n)) for n in ("pointwise1", "depthwise", "pointwise2")
    )
    inner = chain.norm_pad.norm
    scale = inner.weight / (inner.running_var + inner.eps).sqrt()
    kernel = torch.einsum("om,mkl,m,mi->oikl", second[:, :, 0, 0], depthwise[:, 0], scale, first[:, :, 0, 0])
    offset = second[:, :, 0, 0] @ (depthwise.sum(dim=(1, 2, 3)) * (inner.bias - inner.running_mean * scale))
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    dense = F.conv2d(x, kernel, offset, padding=1)
    torch.testing.assert_close(chain(x), chain.norm2(chain.norm1(dense)), rtol=0, atol=1e-12)


def test_frame_holds_the_updated_statistics_image_of_zero_and_no_gradient():
    layer = randomize_norms(BatchNormPad2d(3)).train()
    x = torch.randn(4, 3, 5, 6, requires_grad=True)
    before = layer.norm.running_mean.clone()
    y = layer(x)
    assert y.shape == (4, 3, 7, 8)
    assert not torch.equal(layer.norm.running_mean, before)
    expected = layer.norm.bias - layer.norm.running_mean * layer.norm.weight / (layer.norm.running_var + 1e-5).sqrt()
    for edge in (y[:, :, 0], y[:, :, -1], y[:, :, :, 0], y[:, :, :, -1]):
        torch.testing.assert_close(edge, expected.detach()[None, :, None].expand_as(edge))
    y[:, :, 0].sum().backward()
    assert layer.norm.bias.grad.abs().sum() == 0
    assert x.grad.abs().sum() == 0


def test_a_frame_passes_the_gradient_of_its_inside_and_bears_transforms_of_functions():
    layer = randomize_norms(BatchNormPad2d(3)).eval()
    images = torch.randn(4, 1, 3, 5, 6)
    cotangent = torch.randn(1, 3, 7, 8)
    scale = layer.norm.weight / (layer.norm.running_var + 1e-5).sqrt()
    expected = (cotangent[:, :, 1:-1, 1:-1] * scale[:, None, None]).expand_as(images)
    leaf = images.clone().requires_grad_()
    sum((layer(image) * cotangent).sum() for image in leaf).backward()
    torch.testing.assert_close(leaf.grad, expected)
    by_image = torch.func.vmap(torch.func.grad(lambda image: (layer(image) * cotangent).sum()))(images)
    torch.testing.assert_close(by_image, expected)


def test_the_frame_survives_the_conversion_to_synchronised_norms():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(TransformerBlock(16))
    assert isinstance(block.attn.q_proj.norm_pad, BatchNormPad2d)
    assert isinstance(block.attn.q_proj.norm_pad.norm, nn.SyncBatchNorm)


@pytest.mark.parametrize("time_steps", [1, 3, 4])
def test_attention_multiplies_counts_and_its_taps_show_membranes_and_counts(time_steps):
    attention = randomize_norms(SpikeDrivenSelfAttention(12, num_heads=3, time_steps=time_steps)).double().eval()
    taps = {}
    for name in ("q_neuron", "k_neuron", "v_neuron", "attn_neuron"):
        module = attention.get_submodule(name)
        module.register_forward_hook(lambda m, i, o, name=name: taps.update({name: (i[0], o)}))
    attention(torch.randn(2, 12, 4, 5, dtype=torch.float64))
    counts = {}
    for name in ("q_neuron", "k_neuron", "v_neuron"):
        membrane, output = taps[name]
        counts[name[0]] = output.long().reshape(2, 3, 4, 20)  # head-major channels
        assert torch.equal(output.long().double(), output)
        assert torch.equal((membrane * time_steps + 0.5).floor().clamp(0, time_steps), output)
    product = torch.einsum("bhdn,bhdm,bhem->bhen", counts["q"], counts["k"], counts["v"]).reshape(2, 12, 4, 5)
    drive, output = taps["attn_neuron"]
    assert torch.equal(drive.long(), product)
    fired = ((product + 2 * time_steps**2) // (4 * time_steps**2)).clamp(0, time_steps)
    assert fired.float().mean() > 0.1  # dense enough to mean something
    torch.testing.assert_close(output, fired.double() * (2 / time_steps), rtol=0, atol=1e-15)


def test_softmax_attention_is_for_the_float_twin_alone():
    with pytest.raises(QsdError, match="not spike-driven"):
        SpikeDrivenSelfAttention(8, attention="softmax")
    attention = SpikeDrivenSelfAttention(8, 2, None, None, "softmax").eval()
    taps = {}
    for name in ("q_neuron", "k_neuron", "v_neuron", "attn_neuron"):
        attention.get_submodule(name).register_forward_hook(lambda m, i, o, n=name: taps.update({n: o}))
    attention(torch.randn(1, 8, 3, 3))
    q, k, v = (taps[f"{n}_neuron"].reshape(1, 2, 4, 9) for n in "qkv")
    weights = torch.einsum("bhdn,bhdm->bhnm", q, k).div(2).softmax(-1)  # sqrt(d_h) = 2
    expected = torch.einsum("bhnm,bhem->bhen", weights, v).reshape(1, 8, 3, 3)
    torch.testing.assert_close(taps["attn_neuron"], expected)


def test_heads_must_divide_the_channels():
    with pytest.raises(QsdError, match="10 channels are not divisible by num_heads=4"):
        SpikeDrivenSelfAttention(10, num_heads=4)


def test_a_silent_query_gives_a_silent_attention_with_finite_gradients():
    attention = SpikeDrivenSelfAttention(8, 2).train()
    x = torch.full((2, 8, 3, 3), -5.0, requires_grad=True)
    attention(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("block", [ConvBlock(4), TransformerBlock(8, 2, layer_scale=0.5)], ids=["conv", "transformer"])
def test_recomputation_changes_neither_gradients_nor_statistics(block):
    x = torch.randn(3, 4 if isinstance(block, ConvBlock) else 8, 5, 5)
    plain, lean = copy.deepcopy(block).train(), copy.deepcopy(block).train()
    results = []
    for module, call in ((plain, plain), (lean, lambda t: recompute(lean, t))):
        inputs = x.clone().requires_grad_()
        call(inputs).square().sum().backward()
        results.append([inputs.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_drop_path_acts_on_transformer_blocks_in_training_only():
    block = TransformerBlock(8, 2, layer_scale=1.0, drop_path_rate=0.99).train()
    x = torch.randn(64, 8, 2, 2)
    kept = (block(x) == x).flatten(1).all(1).float().mean()
    assert kept > 0.8  # both branches dropped with probability 0.98
    assert not torch.equal(block.eval()(x), x)


def test_spike_neurons_precede_every_weight_but_chains_inner_ones():
    block = TransformerBlock(8, 2)
    assert sum(isinstance(m, SpikeNeuron) for m in block.modules()) == 7  # entry, q, k, v, product, two in the MLP
