"""Neurons of a learned step: LSQ and QCFS against their formulas under autograd, and the attention built of them."""

import copy
import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from qsd import QsdError, initialize_neurons, neurons
from qsd.functional import learned_spikes, scale_gradient
from qsd.layers import Mlp, NReluSelfAttention, TokenMean
from qsd.layers.steps import learned_steps, step_names
from qsd.neurons import (
    FloatNeuron,
    LearnedStepNeuron,
    LsqNeuron,
    QcfsNeuron,
    SpikeNeuron,
    build_neuron,
    register_neuron,
)


def half_up(x):
    """``floor(x + 1/2)`` with the gradient passed straight through."""
    return (torch.floor(x + 0.5) - x).detach() + x


def slow_lsq(x, step, time_steps, features):
    """Esser et al., equations 1 to 3 with Q_n = 0 and Q_p = T, left to autograd; halves round up.

    The bounds themselves pass no gradient, as in `hardtanh`; `clamp` lets one through in PyTorch 2.11, not in 2.14.
    """
    factor = (features * time_steps) ** -0.5
    step = (step - step * factor).detach() + step * factor
    return half_up(F.hardtanh(x / step, 0, time_steps)) * step


def slow_qcfs(x, ceiling, time_steps):
    """Bu et al.: ``lambda * clip(floor(x T / lambda + 1/2) / T, 0, 1)``, as their published layer orders it."""
    return half_up(F.hardtanh(x / ceiling, 0, 1) * time_steps) / time_steps * ceiling


def gradients(output, inputs, cotangent):
    return torch.autograd.grad((output * cotangent).sum(), inputs)


@pytest.mark.parametrize("time_steps", [1, 2, 4, 7])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "mixed"])
def test_lsq_and_its_gradients_equal_the_formula_under_autograd(time_steps, layout):
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64) * 2
    cotangent = torch.randn_like(x)
    if layout != "contiguous":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "channels last":
        cotangent = cotangent.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    neuron = LsqNeuron(time_steps).double()
    neuron.step.data.fill_(0.7)
    ours = neuron(x)
    slow = slow_lsq(x, neuron.step, time_steps, 4 * 5 * 6)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
    for a, b in zip(gradients(ours, [x, neuron.step], cotangent), gradients(slow, [x, neuron.step], cotangent)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_step_s_gradient_is_the_residue_inside_and_t_above():
    # L = T = 4, one feature: the factor is 1 / sqrt(1 * 4) = 1/2. v = x / s = -1, 0.3, 1.5, 3.7, 4, 9
    x = torch.tensor([-1.0, 0.3, 1.5, 3.7, 4.0, 9.0], dtype=torch.float64)[:, None] * 0.5
    neuron = LsqNeuron(4).double()
    neuron.step.data.fill_(0.5)
    local = [torch.autograd.grad(neuron(row[None]).sum(), neuron.step)[0].item() for row in x]
    assert local == pytest.approx([0, 0.5 * (0 - 0.3), 0.5 * (2 - 1.5), 0.5 * (4 - 3.7), 0.5 * 4, 0.5 * 4])


def test_the_input_s_gradient_passes_strictly_between_silence_and_saturation():
    x = torch.tensor([-1.0, 0.0, 1e-6, 1.0, 1.999, 2.0, 5.0])[:, None].requires_grad_()
    neuron = LsqNeuron(4)
    neuron.step.data.fill_(0.5)
    neuron(x).sum().backward()
    assert x.grad.flatten().tolist() == [0, 0, 1, 1, 1, 0, 0]


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=20), st.integers(1, 8), st.floats(0.1, 3))
def test_qcfs_is_lsq_with_the_ceiling_as_its_parameter(values, time_steps, ceiling):
    x = torch.tensor(values, dtype=torch.float64)[:, None]
    qcfs, lsq = QcfsNeuron(time_steps).double(), LsqNeuron(time_steps).double()
    qcfs.ceiling.data.fill_(ceiling)
    lsq.step.data.fill_(ceiling / time_steps)
    assert torch.equal(qcfs(x), lsq(x))


@pytest.mark.parametrize("time_steps", [1, 4])
def test_qcfs_s_gradients_are_those_of_its_published_layer(time_steps):
    x = (torch.randn(50, 3, dtype=torch.float64) * 6).requires_grad_()
    neuron, cotangent = QcfsNeuron(time_steps).double(), torch.randn(50, 3, dtype=torch.float64)
    assert neuron.ceiling == 8
    ours, slow = neuron(x), slow_qcfs(x, neuron.ceiling, time_steps)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
    for a, b in zip(gradients(ours, [x, neuron.ceiling], cotangent), gradients(slow, [x, neuron.ceiling], cotangent)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_halves_round_up():
    assert learned_spikes(torch.tensor([0.25, 0.75, 1.25]), torch.tensor(0.5), None, 4).tolist() == [1, 2, 3]


def test_beside_its_output_a_neuron_keeps_one_number_per_element():
    kept = []
    x, neuron = torch.randn(2, 500, requires_grad=True), LsqNeuron(4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        neuron(x)
    assert sum(kept) <= 2 * 4000 + 3 * 8  # drive and output; the next layer keeps the output anyway


def test_half_precision_sums_the_step_s_gradient_in_float32():
    # 300,000 equal terms of 1/2: a bfloat16 sum would stop growing at 256.
    neuron = LsqNeuron(4)
    neuron.step.data.fill_(1.0)
    x = torch.full((1, 300_000), 1.5, dtype=torch.bfloat16)
    neuron(x).float().sum().backward()
    assert neuron.step.grad.item() == pytest.approx(150_000 / math.sqrt(300_000 * 4), rel=1e-3)


def test_scaling_a_gradient_leaves_the_value_to_the_bit():
    x = torch.tensor(0.1, requires_grad=True)
    y = scale_gradient(x, 1e-3)
    assert torch.equal(y, x)
    y.backward()
    assert x.grad.item() == pytest.approx(1e-3)


# -- attention ---------------------------------------------------------------------------------------------------------


class SlowAttention(nn.Module):
    """Equations 7 and 11 on values (not counts), with LSQ left to autograd."""

    def __init__(self, attention, time_steps):
        super().__init__()
        self.a, self.time_steps = attention, time_steps

    def quantize(self, x, neuron):
        return slow_lsq(x, neuron.step, self.time_steps, x[0].numel())

    def forward(self, x):
        a, shape = self.a, x.shape
        spikes = self.quantize(x, a.neuron)
        q, k, v = (
            self.quantize(p(spikes), n).reshape(shape[0], a.num_heads, -1, shape[2] * shape[3])
            for p, n in ((a.q_proj, a.q_neuron), (a.k_proj, a.k_neuron), (a.v_proj, a.v_neuron))
        )
        scores = self.quantize(torch.einsum("bhdn,bhdm->bhnm", q, k) / math.sqrt(q.shape[2]), a.score_neuron)
        mixed = torch.einsum("bhnm,bhdm->bhdn", scores / scores.shape[-1], v)
        return a.proj(self.quantize(mixed.reshape(shape), a.attn_neuron))


@pytest.mark.parametrize("time_steps", [1, 3, 4])
def test_attention_on_integers_equals_attention_on_values_with_every_gradient(time_steps):
    attention = NReluSelfAttention(12, num_heads=3, time_steps=time_steps).double().train()
    x = torch.randn(2, 12, 4, 5, dtype=torch.float64)
    assert initialize_neurons(attention, x) == 6
    slow = SlowAttention(copy.deepcopy(attention), time_steps).train()
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = attention(x1), slow(x2)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(ours)
    (ours * cotangent).sum().backward()
    (theirs * cotangent).sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-8, atol=1e-9)
    for (name, p), q in zip(attention.named_parameters(), slow.a.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-9, msg=name)
        # at T = 1 these few scores are all silent or saturated
        assert time_steps == 1 or p.grad.abs().sum() > 0 or name.endswith("conv.bias"), name


def test_taps_show_integer_counts_and_integer_products():
    attention = NReluSelfAttention(12, num_heads=3, time_steps=4).double().train()
    x = torch.randn(2, 12, 4, 5, dtype=torch.float64)
    initialize_neurons(attention, x)
    taps = {}
    for name in ("q_neuron", "k_neuron", "v_neuron", "score_neuron", "attn_neuron"):
        module = attention.get_submodule(name)
        module.register_forward_hook(lambda m, i, o, name=name: taps.update({name: (i[0], o)}))
    attention(x)
    q, k, v = (taps[f"{n}_neuron"][1].long().reshape(2, 3, 4, 20) for n in "qkv")
    for counts, name in zip((q, k, v), "qkv"):
        assert torch.equal(counts.double().flatten(), taps[f"{name}_neuron"][1].flatten())
    product, scores = taps["score_neuron"]
    assert torch.equal(product.long(), torch.einsum("bhdn,bhdm->bhnm", q, k))
    theta = math.sqrt(4) * attention.score_neuron.step / (attention.q_neuron.step * attention.k_neuron.step)
    assert torch.equal(scores, (product / theta + 0.5).floor().clamp(0, 4))
    assert 0.02 < (scores > 0).double().mean() < 1
    mixed = torch.einsum("bhnm,bhdm->bhdn", scores.long(), v).reshape(2, 12, 4, 5)
    assert torch.equal(taps["attn_neuron"][0].long(), mixed)


def test_thresholds_follow_the_number_of_tokens():
    # One token more than none: O = (1/N) sum a v, so tiling the tokens changes nothing but N.
    attention = NReluSelfAttention(8, num_heads=2).double().eval()
    x = torch.randn(1, 8, 2, 3, dtype=torch.float64)
    initialize_neurons(attention, x)
    tiled = attention(x.repeat(1, 1, 3, 2))
    torch.testing.assert_close(tiled, attention(x).repeat(1, 1, 3, 2))


def test_the_float_twin_divides_relus_by_the_number_of_tokens():
    attention = NReluSelfAttention(8, num_heads=2, time_steps=None).eval()
    x = torch.randn(2, 8, 3, 3)
    taps = {}
    attention.attn_neuron.register_forward_hook(lambda m, i, o: taps.update(o=o))
    attention(x)
    q, k, v = (p(x.relu()).relu().reshape(2, 2, 4, 9) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    weights = (torch.einsum("bhdn,bhdm->bhnm", q, k) / 2).relu() / 9
    torch.testing.assert_close(taps["o"], torch.einsum("bhnm,bhdm->bhdn", weights, v).reshape(2, 8, 3, 3).relu())


def test_wrong_arguments_of_the_attention_are_named():
    for arguments, message in (
        ({"num_heads": 3}, "8 channels are not divisible by num_heads=3"),
        ({"neurons": "fixed"}, "needs learned steps"),
        ({"neurons": "other"}, "neurons 'other' are unknown"),
        ({"attention": "softmax"}, "not spike-driven"),
    ):
        with pytest.raises(QsdError, match=message):
            NReluSelfAttention(8, **{"num_heads": 2, **arguments})


# -- steps -------------------------------------------------------------------------------------------------------------


def test_a_step_has_its_value_when_the_constructor_returns():
    # what a standard normal input would give it, whose mean absolute value is sqrt(2 / pi)
    neuron = LsqNeuron(4)
    assert neuron.step.shape == ()
    assert neuron.threshold == pytest.approx(2 * math.sqrt(2 / math.pi) / 2)
    assert neuron.threshold == neuron.amplitude == neuron.step.item()
    before = neuron.threshold
    neuron.initialize(torch.randn(10_000, 100))
    assert neuron.threshold == pytest.approx(before, rel=0.01)


def test_initialization_sets_each_step_from_the_quantized_output_of_those_before_and_nothing_else():
    block = Mlp(6, 12, neurons="lsq").eval()
    x = torch.randn(4, 6, 5, 5)
    before = {name: t.clone() for name, t in block.state_dict().items()}
    assert initialize_neurons(block, x) == 2
    assert not block.training
    first = 2 * x.abs().mean() / 2
    torch.testing.assert_close(block.neuron1.step.data, first)
    hidden = nn.functional.batch_norm(
        block.fc1.conv((x / first + 0.5).floor().clamp(0, 4) * first), None, None, training=True
    )
    torch.testing.assert_close(block.neuron2.step.data, 2 * hidden.abs().mean() / 2)
    changed = {name for name, t in block.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"neuron1.step", "neuron2.step"}


def test_initialization_of_a_compiled_network_leaves_nothing_behind():
    block = Mlp(4, 4, neurons="lsq").train()
    block.compile(backend="eager")
    initialize_neurons(block, torch.randn(4, 4, 3, 3))
    steps = [block.neuron1.step.item(), block.neuron2.step.item()]
    block(torch.randn(4, 4, 3, 3) * 100)
    assert steps == [block.neuron1.step.item(), block.neuron2.step.item()]


def test_silence_and_other_networks_are_left_alone():
    neuron = LsqNeuron(4)
    before = neuron.threshold
    neuron.initialize(torch.zeros(3, 4))
    assert neuron.threshold == before
    assert initialize_neurons(nn.Sequential(QcfsNeuron(4), SpikeNeuron(4), FloatNeuron()), torch.randn(2, 3)) == 0


def test_another_window_keeps_the_range():
    for neuron in (LsqNeuron(4), QcfsNeuron(4)):
        ceiling = neuron.threshold * 4
        neuron.change_time_steps(6)
        assert neuron.time_steps == 6
        assert neuron.threshold * 6 == pytest.approx(ceiling)
        with pytest.raises(QsdError, match="time_steps=0"):
            neuron.change_time_steps(0)


def test_counts_and_amplitudes_are_the_interface_of_every_neuron():
    x = torch.randn(3, 50)
    for neuron in (SpikeNeuron(4), LsqNeuron(4), QcfsNeuron(4), LsqNeuron(4, amplitude=1.0), LsqNeuron(4, 0.25)):
        counts = neuron.counts(x)
        assert set(counts.unique().tolist()) <= set(range(5))
        torch.testing.assert_close(neuron(x), counts * neuron.amplitude)
        assert torch.equal((neuron.drive(x) + 0.5).floor().clamp(0, 4), counts)
    scaled = LsqNeuron(4).counts(torch.arange(40.0)[None], 0.1)
    assert torch.equal(scaled, LsqNeuron(4).counts(torch.arange(40.0)[None] * 0.1))


def test_build_neuron_knows_every_kind():
    assert isinstance(build_neuron(4, kind="lsq"), LsqNeuron)
    assert isinstance(build_neuron(4, kind="qcfs"), QcfsNeuron)
    assert type(build_neuron(4)) is SpikeNeuron
    assert isinstance(build_neuron(None, kind="lsq"), FloatNeuron)
    assert "amplitude=step" in repr(build_neuron(4, kind="lsq"))


def test_the_token_mean():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(TokenMean()(x), x.mean((2, 3)))


def test_a_neuron_of_one_s_own_is_one_entry(monkeypatch):
    class ThetaNeuron(LearnedStepNeuron):
        """A step of another name, without a factor on its gradient."""

        def __init__(self, time_steps=4, amplitude=None):
            super().__init__(time_steps, amplitude)
            self.theta = nn.Parameter(torch.ones(()))

        def step_size(self, features):
            return self.theta

        def initialize(self, x, scale=None):
            self.theta.fill_(2.0)

    monkeypatch.setattr(neurons, "_NEURONS", dict(neurons._NEURONS))
    register_neuron("theta", lambda time_steps, _threshold, amplitude: ThetaNeuron(time_steps, amplitude))
    with pytest.raises(QsdError, match="'theta' is registered already"):
        register_neuron("theta", ThetaNeuron)
    model = timm.create_model("csdformer_2_384", activation="theta", embed_dims=16, num_heads=2, depth=1, num_classes=3)
    steps = learned_steps(model)
    assert "blocks.0.attn.score_neuron" in steps
    assert "blocks.0.attn.score_neuron.theta" in step_names(model)
    assert initialize_neurons(model, torch.randn(2, 3, 32, 32)) == len(steps)
    assert {float(step) for step in steps.values()} == {2.0}
