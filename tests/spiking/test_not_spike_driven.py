"""Networks that are not spike-driven: the audit names the operation of each, for binary and for counted values alike.

Each trick stands between a neuron and the next convolution. It sees the spikes (0 and 1 in every time step) and the
current that drove the neuron, and returns something in the spikes' shape. A trick that only looks at whether a tensor
*holds* 0 and 1 would let many of them pass, above all at T = 1, where counts are spikes.
"""

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qsd import QsdError, audit_spike_driven, to_spike_driven
from qsd.layers import QuantConv2d, QuantLinear, conv_norm
from qsd.neurons import SpikeNeuron

TABLE = torch.tensor([[0.0], [0.7]], dtype=torch.float64)


class Network(nn.Module):
    """Stem, neuron, convolution, neuron, head, with a trick before the second convolution.

    With ``hidden`` another neuron stands between the trick and the convolution, which then sees nothing but spikes.
    """

    def __init__(self, time_steps, hidden=False):
        super().__init__()
        self.first, self.neuron = conv_norm(3, 4, 3), SpikeNeuron(time_steps)
        self.between = SpikeNeuron(time_steps, 0.3) if hidden else nn.Identity()
        self.second, self.last = QuantConv2d(4, 4, 3, padding=1), SpikeNeuron(time_steps, 0.01)
        self.head = QuantLinear(4, 2)
        self.trick, self.hidden = None, hidden

    def forward(self, x):
        current = self.first(x)
        spikes = self.neuron(current)
        if self.trick is not None:
            # In the first layer the current is the same in every step and has no time axis yet.
            repeats = len(spikes) // len(current)
            spikes = self.trick(spikes, current.repeat(repeats, 1, 1, 1))
        return self.head(self.last(self.second(self.between(2 * spikes if self.hidden else spikes)).mean((2, 3))))


def shaped(values, like):
    """Any values in the shape of the spikes, by plain rearrangement."""
    flat = values.reshape(-1).to(like.dtype)
    repeats = -(-like.numel() // flat.numel())
    return flat.repeat(repeats)[: like.numel()].reshape(like.shape)


def plain(x):
    return x.as_subclass(torch.Tensor)


def copied(spikes, current):
    whole = torch.empty_like(current, dtype=torch.long)
    whole.copy_(current * 4)
    return whole.to(spikes.dtype)


def filled(spikes, current):
    value = torch.zeros((), dtype=current.dtype)
    value.fill_(current.flatten()[0])
    return spikes + value


def selected(spikes, current):
    return shaped(torch.cat([current.masked_select(spikes > 0), current.new_zeros(1)]), spikes)


def scattered(spikes, current):
    return current.new_zeros(current.shape).scatter(1, spikes.long(), current)


def put(spikes, current):
    result = current.new_zeros(2)
    result.index_put_((spikes.long().flatten()[:1],), current.flatten()[:1])
    return shaped(result, spikes)


def multiplied_into(spikes, current):
    return F.conv2d(spikes, current[:1, :, :3, :3].repeat(4, 1, 1, 1), padding=1)


def attended(spikes, current):
    tokens = spikes.flatten(2).transpose(1, 2)
    return shaped(F.scaled_dot_product_attention(tokens, tokens, tokens), spikes)


TRICKS = {
    # A nonlinearity of 0 and 1.
    "softmax": lambda s, c: s.softmax(1),
    "log_softmax": lambda s, c: s.log_softmax(1),
    "layer_norm": lambda s, c: F.layer_norm(s, s.shape[1:]),
    "group_norm": lambda s, c: F.group_norm(s, 2),
    "instance_norm": lambda s, c: F.instance_norm(s),
    "batch_norm": lambda s, c: F.batch_norm(s, None, None, training=True),
    "standardize": lambda s, c: (s - s.mean()) / s.std(),
    "divide_by_sum": lambda s, c: s / (1 + s.sum(1, keepdim=True)),
    "normalize": lambda s, c: F.normalize(s + 1, dim=1),
    "logsumexp": lambda s, c: shaped(s.logsumexp(1), s),
    "exponential": lambda s, c: s.exp(),
    "power": lambda s, c: (s + 1).pow(0.5),
    "square_root": lambda s, c: s.sqrt(),
    "sigmoid": lambda s, c: s.sigmoid(),
    "gelu": lambda s, c: F.gelu(s),
    "cosine": lambda s, c: s.cos(),
    "product_over_channels": lambda s, c: shaped(s.prod(1), s),
    "running_product": lambda s, c: (s + 1).cumprod(1),
    "maximum_over_channels": lambda s, c: s.amax(1, keepdim=True).expand_as(s),
    "functional_pool": lambda s, c: F.max_pool2d(s, 3, 1, 1),
    "any_over_channels": lambda s, c: s.bool().any(1, keepdim=True).expand_as(s).to(s.dtype),
    "sorted": lambda s, c: s.sort(1).values,
    "top": lambda s, c: s.topk(4, dim=1).values,
    "position_of_maximum": lambda s, c: s.argmax(1, keepdim=True).expand_as(s).to(s.dtype),
    "logical_or": lambda s, c: (s.bool() | s.roll(1, -1).bool()).to(s.dtype),
    "exclusive_or": lambda s, c: (s.bool() ^ s.roll(1, -1).bool()).to(s.dtype),
    "maximum_of_two": lambda s, c: torch.maximum(s, s.roll(1, -1)),
    "attention": attended,
    "distance": lambda s, c: shaped(torch.cdist(s.flatten(2), s.flatten(2)), s),
    "random": lambda s, c: torch.bernoulli(0.5 * s),
    # A table that spikes look values up in.
    "lookup_by_index": lambda s, c: TABLE[s.long(), 0],
    "lookup_by_embedding": lambda s, c: F.embedding(s.long(), TABLE)[..., 0],
    "lookup_by_take": lambda s, c: TABLE.take(s.long()),
    "lookup_by_gather": lambda s, c: TABLE[:, 0].expand(s.numel() // 2, 2).gather(1, s.long().view(-1, 2)).view_as(s),
    "lookup_by_where": lambda s, c: torch.where(s > 0, 0.7, 0.1).to(s.dtype),
    "lookup_by_index_select": lambda s, c: TABLE[:, 0].index_select(0, s.long().flatten()).view_as(s),
    # A spike that gates an analog value.
    "gate_by_where": lambda s, c: torch.where(s > 0, c, 0.0),
    "gate_by_masked_fill": lambda s, c: c.masked_fill(s == 0, 0.0),
    "gate_by_index": lambda s, c: shaped(torch.cat([c[s > 0], c.new_zeros(1)]), s),
    "gate_by_masked_select": selected,
    "gate_by_gather": lambda s, c: c.gather(1, s.long()),
    "gate_by_scatter": scattered,
    "gate_by_index_put": put,
    "gate_by_product": lambda s, c: s * c,
    "gate_by_addcmul": lambda s, c: torch.addcmul(s, s, c),
    "gate_by_lerp": lambda s, c: torch.lerp(s, c, s),
    # Rounding that hides.
    "cast_to_long": lambda s, c: (4 * c).long().to(s.dtype),
    "cast_to_half": lambda s, c: c.half().to(s.dtype),
    "cast_to_bool": lambda s, c: c.bool().to(s.dtype),
    "copy_into_integers": copied,
    "view_of_bits": lambda s, c: (c.contiguous().view(torch.int64) >> 62).to(s.dtype),
    "floor": lambda s, c: c.floor(),
    "comparison": lambda s, c: (c > 0.1).to(s.dtype),
    "sign": lambda s, c: c.sign(),
    "clamp": lambda s, c: c.clamp(0, 1),
    "relu": lambda s, c: c.relu(),
    "buckets": lambda s, c: torch.bucketize(c, TABLE[:, 0]).to(s.dtype),
    # A value that takes another road.
    "fill": filled,
    "number": lambda s, c: s + c.flatten()[0].item(),
    "numpy": lambda s, c: torch.from_numpy(c.as_subclass(torch.Tensor).numpy().copy()),
    "kernel": multiplied_into,
    "analog_product": lambda s, c: c @ c.transpose(-1, -2) @ s,
}


class Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx, current):
        return current.clamp_min(0)


@torch.jit.script
def scripted(current: torch.Tensor) -> torch.Tensor:
    return (current > 0.1).to(current.dtype)


def filled_whole(spikes, current):
    whole = torch.zeros((), dtype=torch.long)
    whole.fill_(4 * current.flatten()[0])
    return spikes + whole


TRICKS |= {
    # Rounding by the type of a result.
    "sum_as_integers": lambda s, c: (4 * c).unsqueeze(0).sum(0, dtype=torch.long).to(s.dtype),
    "running_sum_as_integers": lambda s, c: (4 * c).cumsum(1, dtype=torch.int32).to(s.dtype),
    "mean_in_half": lambda s, c: c.unsqueeze(0).mean(0, dtype=torch.bfloat16).to(s.dtype),
    "slice_of_integers": lambda s, c: torch.slice_scatter(torch.zeros_like(c, dtype=torch.long), 4 * c).to(s.dtype),
    "fill_of_integers": filled_whole,
    "truncated": lambda s, c: c.trunc(),
    "remainder": lambda s, c: c.remainder(0.5),
    # A product in other words.
    "gate_by_scatter": lambda s, c: c.scatter(1, torch.arange(4).view(1, 4, 1, 1).expand_as(c), s, reduce="multiply"),
    "gate_by_large_integers": lambda s, c: s * (c * 2.0**60) * 2.0**-60,
    "gate_by_bilinear_form": lambda s, c: shaped(F.bilinear(s, c, torch.ones(4, s.shape[-1], s.shape[-1]).double()), s),
    "products_of_sums": lambda s, c: torch.einsum("bchw,bdhw->bcd", c, c).mean() + s,
    "complex_product": lambda s, c: torch.view_as_real(torch.complex(s, c) * torch.complex(s, c))[..., 0],
    "spectrum": lambda s, c: torch.fft.rfft(s).abs().sum() + s,
    "angle": lambda s, c: torch.atan2(c, s),
    "length": lambda s, c: torch.hypot(c, s),
    # A value that takes another road.
    "numpy_beside": lambda s, c: 0 * s + torch.from_numpy((plain(c).numpy() > 0.1).astype(float)),
    "array_beside": lambda s, c: 0 * s + torch.from_numpy(np.sign(np.asarray(plain(c)))),
    "list_beside": lambda s, c: 0 * s + torch.tensor(c.tolist(), dtype=s.dtype),
    "values_beside": lambda s, c: 0 * s + (torch.tensor([*c.flatten()]) > 0.1).to(s.dtype).view(s.shape),
    "copy_as_data": lambda s, c: (torch.tensor(plain(c)) > 0.1).to(s.dtype),
    "sparse": lambda s, c: plain(c).to_sparse().to_dense() + s,
    "function_of_one_s_own": lambda s, c: Rectified.apply(c),
    "script": lambda s, c: scripted(plain(c)),
    "vectorised": lambda s, c: torch.func.vmap(torch.relu)(plain(c)),
    "checkpointed": lambda s, c: torch.utils.checkpoint.checkpoint(torch.relu, c, use_reentrant=False),
    # An order, a choice or a table.
    "running_maximum": lambda s, c: s.cummax(1).values,
    "median": lambda s, c: s.median(1, keepdim=True).values.expand_as(s),
    "order": lambda s, c: c.argsort(1).to(s.dtype),
    "repeated_by_spikes": lambda s, c: shaped(c.flatten().repeat_interleave(1 + s.long().flatten()), s),
    "counted_in_bins": lambda s, c: shaped(torch.bincount(s.long().flatten(), minlength=2), s),
    "one_hot": lambda s, c: F.one_hot(s.long(), 2)[..., 0].to(s.dtype),
    "smallest": lambda s, c: torch.minimum(s, c.detach()),
    "equal_currents": lambda s, c: torch.isclose(c, c.roll(1, -1)).to(s.dtype),
}  # fmt: skip


@functools.cache
def converted(time_steps, hidden):
    torch.manual_seed(0)
    return to_spike_driven(Network(time_steps, hidden).double().eval())


def findings(trick, time_steps, images, hidden=False):
    spiking = converted(time_steps, hidden)
    spiking.network.trick = trick  # after the conversion, whose comparison of counts would refuse some of them
    return audit_spike_driven(spiking, images)


@pytest.fixture
def images():
    return torch.randn(2, 3, 10, 10, dtype=torch.float64)


@pytest.mark.parametrize("time_steps", [1, 4])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_network_without_a_trick_passes(hidden, time_steps, images):
    findings(None, time_steps, images, hidden).check()


@pytest.mark.parametrize("time_steps", [1, 4])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", TRICKS)
def test_a_network_that_is_not_spike_driven_is_refused(name, hidden, time_steps, images):
    if hidden and name == "fill":
        pytest.skip("a current that is added to a membrane is what a neuron is for")
    audit = findings(TRICKS[name], time_steps, images, hidden)
    assert not audit.spike_driven
    with pytest.raises(QsdError, match="are not spike-driven"):
        audit.check()


@pytest.mark.parametrize("name", TRICKS)
def test_it_is_refused_on_images_without_a_spike_too(name):
    audit = findings(TRICKS[name], 4, torch.full((1, 3, 10, 10), -1e-9, dtype=torch.float64))
    with pytest.raises(QsdError, match=r"not spike-driven|saw no spike"):
        audit.check()


REARRANGED = {
    "half of the spikes": lambda s, c: s * (torch.arange(s.shape[-1]) % 2).to(s.dtype),
    "moved": lambda s, c: s.roll(1, -1),
    "channels in another order": lambda s, c: s[:, [3, 2, 1, 0]],
    "enlarged and cut": lambda s, c: F.interpolate(s, scale_factor=2)[..., : s.shape[-2], : s.shape[-1]],
    "as bits and back": lambda s, c: s.bool().to(s.dtype),
    "compared with zero": lambda s, c: (s > 0).to(s.dtype),
    "parts of two neurons": lambda s, c: torch.cat([s[:, :2], s[:, 2:].flip(-1)], dim=1),
}


@pytest.mark.parametrize("time_steps", [1, 4])
@pytest.mark.parametrize("name", REARRANGED)
def test_rearranged_spikes_pass(name, time_steps, images):
    findings(REARRANGED[name], time_steps, images).check()


def test_hooks_of_a_neuron_and_of_the_whole_network_are_seen(images):
    rules = {
        "neuron": lambda module, inputs, output: output.amax(1, keepdim=True).expand_as(output),
        "": lambda module, inputs, output: output.relu(),
    }
    for name, rule in rules.items():
        spiking = to_spike_driven(Network(4).double().eval())
        spiking.network.get_submodule(name).register_forward_hook(rule)
        with pytest.raises(QsdError, match="are not spike-driven"):
            audit_spike_driven(spiking, images).check()


def test_a_value_that_a_module_keeps_from_the_last_batch_is_seen(images):
    spiking = to_spike_driven(Network(4).double().eval())
    kept = []

    def trick(spikes, current):
        kept.append(current.clone())
        return spikes * kept[-2] if len(kept) > 1 else spikes

    spiking.network.trick = trick
    with pytest.raises(QsdError, match="a binary operand times an analog one"):
        audit_spike_driven(spiking, [(images, None), (images, None)]).check()


def test_a_layer_that_sees_images_and_currents_is_named():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = QuantConv2d(3, 3, 3, padding=1), QuantConv2d(3, 3, 3, padding=1)
            self.neuron, self.head = SpikeNeuron(4), QuantConv2d(3, 2, 1)

        def forward(self, x):
            return self.head(self.neuron(self.layer(x) + self.other(x)))

    spiking = to_spike_driven(Twice().double().eval())
    spiking.network.neuron.register_forward_pre_hook(lambda module, inputs: spiking.network.layer(0.1 * inputs[0]))
    audit = audit_spike_driven(spiking, torch.randn(1, 3, 8, 8).double())
    assert [(o.name, o.stem, o.spike_driven) for o in audit.operations] == [
        ("layer", True, False), ("other", True, False), ("layer", False, False), ("head", False, True),
    ]  # fmt: skip
    with pytest.raises(QsdError, match=r"layer \(convolution\): its input is analog"):
        audit.check()
