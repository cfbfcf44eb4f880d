"""The binary code: digits of counts, the networks that exchange them, their steps and their cost."""

import copy
import functools
import itertools

import pytest
import timm
import torch
from torch import nn

from qsd import (
    QsdError,
    audit_spike_driven,
    calibrate_delays,
    load_packed,
    measure_energy,
    save_packed,
    to_spike_driven,
)
from qsd.layers import QuantConv2d, TokenMean, conv_norm
from qsd.models.packed_file import read_packed
from qsd.neurons import SpikeNeuron
from qsd.spiking import compare_counts, measure_lost_spikes
from qsd.spiking.codes import CODES, build_code
from qsd.spiking.conversion import convert
from qsd.spiking.layers import DelayedNeuron, HalfEvenNeuron
from qsd.spiking.runtime import Runtime
from qsd.spiking.steps import pool_increment, product_increment
from tests.helpers import sample
from tests.helpers.networks import NAMES, SMALL, assert_same_counts, dense_network

WINDOWS = [1, 2, 3, 4, 5, 6, 7, 8, 10, 15]
FAMILY = ["qsd_tiny", "csdformer_4_256"]
IMAGES = torch.randn(2, 3, 32, 32, dtype=torch.float64)


@functools.cache
def small(name):
    """One small network of a family for all tests."""
    return dense_network(name, depth=2)


@functools.cache
def small_binary(name):
    """Its conversion to the binary code."""
    return to_spike_driven(small(name), code="binary")


@functools.cache
def small_unary(name):
    """Its conversion to the unary code."""
    return to_spike_driven(small(name))


def digits_on_paper(count, digits):
    """The spikes of a count by Python's own formatting of numbers."""
    return [int(digit) for digit in format(count, f"0{digits}b")]


def count_on_paper(twice_membrane, threshold, largest):
    """The trained count in integers: the nearest number of thresholds, halves upwards, from 0 to T."""
    return min(max((twice_membrane + threshold) // (2 * threshold), 0), largest)


# -- one neuron, one pool, one product ---------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", sample([1, 3, 4, 10, 16], range(1, 33)))
def test_counts_are_their_binary_digits(largest):
    code, counts = build_code("binary", largest), torch.arange(largest + 1)
    expected = torch.tensor([digits_on_paper(n, code.steps) for n in range(largest + 1)]).T
    assert 2 ** (code.steps - 1) <= largest < 2**code.steps
    assert torch.equal(code.digits(counts), expected)
    assert torch.equal(code.counts(expected), counts.to(torch.uint8))
    assert torch.equal(code.ones(counts), expected.sum(0))
    assert torch.equal(build_code("unary", largest).digits(counts).sum(0), counts)


@pytest.mark.parametrize("largest", sample([2, 4, 7, 10], range(1, 17)))
def test_a_neuron_fires_the_digits_of_the_trained_count_for_every_membrane(largest):
    # Thresholds of every kind: odd ones, binary fractions, and 1/T, whose multiples are rounded.
    for threshold in (1, 2, 3, 7):
        membranes = range(-3 * threshold, (largest + 3) * threshold + 1)
        counts = [count_on_paper(2 * v, threshold, largest) for v in membranes]
        for scale in (1.0, 0.25):
            currents = torch.tensor([[v * scale for v in membranes]], dtype=torch.float64)
            code = Runtime(largest, "binary").code
            expected = torch.tensor([digits_on_paper(n, code.steps) for n in counts]).T.double()
            # The whole input in one step, and in parts that cancel.
            for noise in (0, 8.0):
                streams = torch.cat([currents * 0 + noise] * (code.steps - 1) + [currents])
                streams[-1] -= noise * (code.steps - 1)
                for delay in (code.steps - 1, code.steps + 2):
                    assert torch.equal(integrate(streams, threshold * scale, largest, delay), expected)


def integrate(currents, threshold, largest, delay):
    """The delayed neuron over its window, by the module that networks use: ``[steps, M]`` to spikes ``[steps, M]``."""
    runtime = Runtime(largest, "binary")
    neuron = DelayedNeuron(SpikeNeuron(largest, threshold=float(threshold)), "n", delay, runtime)
    with runtime.running("step"):
        return neuron(currents.flatten(0, 1)).view(currents.shape)


def test_a_saturated_neuron_keeps_its_last_digit_though_the_largest_count_of_thresholds_is_rounded():
    # 0.1 has no binary fraction: 5 thresholds of 0.1 and some others are rounded down, and a bound there would lose
    # the last digit of 101.
    for threshold in (0.1, 1 / 3, 1 / 7, 0.7):
        for largest in (5, 11, 13):
            steps = build_code("binary", largest).steps
            currents = torch.zeros(steps, 1, dtype=torch.float64)
            currents[0] = 100.0
            spikes = integrate(currents, threshold, largest, steps - 1)
            assert spikes.flatten().tolist() == digits_on_paper(largest, steps)


@pytest.mark.parametrize("code", CODES)
def test_halves_that_round_to_even_counts_do_so_in_either_code(code):
    for largest in (1, 4, 7, 10):
        trained, membranes = SpikeNeuron(largest, 2.0, rounding="half_even"), torch.arange(-8.0, 4 * largest + 9)
        runtime = Runtime(largest, code)
        neuron = HalfEvenNeuron(trained, "n", runtime.code.steps - 1, runtime)
        currents = torch.cat([torch.zeros(runtime.code.steps - 1, len(membranes)), membranes[None]])
        with runtime.running("step"):
            spikes = neuron(currents.flatten()).view(currents.shape)
        assert torch.equal(runtime.code.counts(spikes).float(), (membranes / 2).round().clamp(0, largest))


def test_the_next_digit_of_the_largest_count_is_the_growth_of_the_largest_number():
    for largest in (1, 4, 6):
        code = build_code("binary", largest)
        windows = torch.tensor(list(itertools.product(range(largest + 1), repeat=3))).double()
        total = pooled = None
        digits = []
        for spikes in code.digits(windows):
            digit, total, pooled = pool_increment(spikes, total, pooled, lambda x: x.amax(1), radix=2)
            digits.append(digit)
        assert torch.equal(torch.stack(digits), code.digits(windows.amax(1)))


@pytest.mark.parametrize("largest", [1, 4, 15])
def test_shifted_increments_add_up_to_the_product_of_counts_also_when_windows_are_offset(largest):
    code, lead = build_code("binary", largest), 2
    counts = torch.randint(0, largest + 1, (2, 3, 5, 7)), torch.randint(0, largest + 1, (2, 3, 7, 6))
    silent = torch.zeros(lead, *counts[0].shape), torch.zeros(lead, *counts[1].shape)
    left = torch.cat([code.digits(counts[0].float()), silent[0]])
    right = torch.cat([silent[1], code.digits(counts[1].float())])
    sums = torch.zeros_like(left[0]), torch.zeros_like(right[0])
    total = torch.zeros(2, 3, 5, 6)
    for step, (x, y) in enumerate(zip(left, right), 1):
        increment, *sums = product_increment(x, y, *sums, (code.places(step), code.places(step - lead)))
        total += increment
    assert torch.equal(total.long(), torch.einsum("bhic,bhcj->bhij", *counts))


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sample(FAMILY, NAMES))
def test_networks_fire_the_trained_counts_for_every_window(name):
    options, images = sample({"depth": 2}, {}), torch.randn(2, 3, *sample((32, 34), (41, 34)), dtype=torch.float64)
    for time_steps in sample([4, 6], WINDOWS):
        model = dense_network(name, time_steps=time_steps, **options)
        spiking = to_spike_driven(model, code="binary")
        assert spiking.code.steps == time_steps.bit_length()
        assert_same_counts(model, spiking, images)


@pytest.mark.parametrize("name", FAMILY)
def test_digits_on_one_clock_are_those_of_each_image_alone(name):
    spiking = small_binary(name)
    images = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64)
    stream = spiking.stream(images, record="*", interval=spiking.interval() + 1)
    assert spiking.interval() == 2 * 3 - 1, "a membrane is busy for two windows but one step"
    assert stream.finished == [spiking.latency(), spiking.latency() + 6]
    for k, image in enumerate(images):
        trace = spiking.simulate(image)
        torch.testing.assert_close(stream.logits[k], trace.logits, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(stream.counts[name][k], counts) for name, counts in trace.counts.items())


def test_steps_of_the_published_network():
    # b + 61 neurons and 8 waiting queries of b - 1 steps each; in the unary code T in the place of b, 211 at T = 4.
    for time_steps, code, latency, window in ((4, "binary", 141, 3), (15, "unary", 981, 15), (15, "binary", 211, 4)):
        model = timm.create_model("qsd_15m", **{**SMALL, "depth": 8}, time_steps=time_steps)
        network = convert(model, None, "none", None, None, check=False, code=code)
        assert (network.latency(), network.interval()) == (latency, 2 * window - 1)


class Branches(nn.Module):
    """Pools of spikes and of currents, windows that meet on a residual stream, and a mean of spikes."""

    def __init__(self, time_steps):
        super().__init__()
        self.left, self.right = conv_norm(3, 6, 3), conv_norm(3, 6, 3)
        self.neuron, self.other, self.last = (SpikeNeuron(time_steps, 0.3) for _ in range(3))
        self.pool, self.enlarge = nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Upsample(scale_factor=2)
        self.deep, self.head = conv_norm(6, 6, 3), QuantConv2d(6, 4, 1)
        self.mean, self.shape = TokenMean(), nn.Unflatten(1, (4, 1, 1))
        self.classes = QuantConv2d(4, 3, 1)

    def forward(self, x):
        spikes = self.neuron(self.left(2 * x - 1))
        deep = self.pool(self.other(self.deep(self.pool(spikes))))
        stream = self.pool(self.right(x))[..., ::2, ::2] + deep + 0.5 * self.pool(spikes)[..., ::2, ::2]
        return self.classes(self.shape(self.mean(self.head(self.enlarge(self.last(stream))))))


@pytest.mark.parametrize("time_steps", sample([3, 4], WINDOWS))
def test_windows_that_meet_are_added_and_spikes_beside_layers_carry_their_value(time_steps):
    model = Branches(time_steps).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    spiking = to_spike_driven(model, example=images[:1], code="binary")
    assert_same_counts(model, spiking, images)
    stream = spiking.stream(images.split(1))
    torch.testing.assert_close(torch.cat(stream.logits), model(images), rtol=1e-10, atol=1e-12)


def test_a_network_of_currents_takes_them_once():
    model = (
        nn.Sequential(SpikeNeuron(5), nn.Flatten(), nn.Unflatten(1, (3, 4, 4)), QuantConv2d(3, 4, 3)).double().eval()
    )
    currents = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    spiking = to_spike_driven(model, example=currents[:1], currents=True, code="binary")
    assert_same_counts(model, spiking, currents)
    stream = spiking.stream(currents.split(3), interval=spiking.interval() + 2)
    torch.testing.assert_close(torch.cat(stream.logits), model(currents), rtol=1e-12, atol=1e-12)
    assert spiking.latency() == 3 + 2


# -- measurements ------------------------------------------------------------------------------------------------------


def spikes_of_inputs(spiking, images):
    """By synapse and by query of an attention, the spikes that come in over all steps."""
    fired = {}

    def note(layer, inputs, _output):
        fired[layer.name] = float(inputs[-1].sum())

    seen = [m for m in spiking.layers().values() if m.role == "synapse" or m.name.endswith(".query")]
    handles = [layer.register_forward_hook(note) for layer in seen]
    spiking.simulate(images)
    for handle in handles:
        handle.remove()
    return fired


@pytest.mark.parametrize("name", FAMILY)
def test_spikes_and_additions_are_those_that_were_fired_and_stand_beside_the_other_code(name):
    codes = {}
    for code, spiking in (("unary", small_unary(name)), ("binary", small_binary(name))):
        energy = measure_energy(spiking, IMAGES, progress=False)
        fired = spikes_of_inputs(spiking, IMAGES)
        for layer in energy.layers:
            if layer.name in fired and layer.kind != "stem":
                assert layer.spikes == pytest.approx(fired[layer.name] / 2), layer.name
        mine = next(cost for cost in energy.codes if cost.code == code)
        assert mine.energy_mj == pytest.approx(energy.total)
        assert mine.additions == pytest.approx(sum(layer.additions["merged"] for layer in energy.layers))
        assert mine.shifts == (mine.additions if code == "binary" else 0)
        codes[code] = energy.codes
    # Both columns are the same, whichever code the network has, and counts of T = 4 have fewer digits of 1.
    for one, other in zip(*codes.values()):
        assert (one.code, one.steps) == (other.code, other.steps)
        assert (one.spikes, one.additions) == pytest.approx((other.spikes, other.additions))
    unary, binary = codes["unary"]
    assert (unary.steps, binary.steps) == (4, 3)
    assert binary.spikes < unary.spikes


def test_products_skip_zeros_of_the_sums_that_they_meet():
    spiking, name, heads = small_binary("csdformer_4_256"), "blocks.0.attn", 4
    trace = spiking.simulate(IMAGES, record=f"{name}.*")
    query, key = (trace.spikes[f"{name}.{n}_neuron"].double().flatten(3).unflatten(2, (heads, -1)) for n in "qk")
    lefts, rights = torch.zeros_like(query[0]), torch.zeros_like(key[0])
    additions = skipping = 0.0
    for left, right in zip(query, key):  # [B, heads, d, N]
        rights = rights + right
        skipping += float((left.transpose(-1, -2) @ (rights > 0).double()).sum())
        skipping += float(((lefts > 0).double().transpose(-1, -2) @ right).sum())
        lefts = lefts + left
        additions += float(left.sum() + right.sum()) * left.shape[-1]
    layers = {layer.name: layer for layer in measure_energy(spiking, IMAGES, progress=False).layers}
    product = layers[f"{name}.score_product"]
    assert product.additions["merged"] == pytest.approx(additions / 2)
    assert product.zero_skipping == pytest.approx(skipping / 2)


@pytest.mark.parametrize("name", FAMILY)
def test_the_audit_finds_one_bit_by_synapse_and_step_and_names_the_shifts(name):
    audit = audit_spike_driven(small_binary(name), IMAGES)
    audit.check()
    for operation in audit.operations:
        synapse = operation.operation in ("convolution", "linear")
        if operation.stem or operation.operation == "pool":
            assert operation.shift == 0
        else:
            assert operation.shift == 2  # the first of three digits
            assert operation.status == "binary" if synapse else operation.spike_driven
    assert {o.shift for o in audit_spike_driven(small_unary(name), IMAGES).operations} == {0}


def test_a_lost_spike_costs_its_digit_and_more_of_the_output_than_in_the_unary_code():
    found = {}
    for code, spiking in (("unary", small_unary("qsd_tiny")), ("binary", small_binary("qsd_tiny"))):
        found[code] = measure_lost_spikes(spiking, IMAGES, shares=(0.0, 0.02, 1.0))
        nothing, some, everything = found[code].rows
        assert (nothing.lost, nothing.logit_error, nothing.count_error, nothing.agreement) == (0, 0, 0, 1)
        assert 0.01 < some.lost / found[code].spikes < 0.03
        assert 0 < some.logit_error < everything.logit_error
        assert some.count_error > 0
        counts = spiking.simulate(IMAGES).counts
        total = sum(int(c.sum(dtype=torch.int64)) for c in counts.values())
        assert found[code].spikes * found[code].units == pytest.approx(total / 2)
        assert torch.equal(spiking.simulate(IMAGES).logits, spiking.simulate(IMAGES).logits), "the hooks are gone"
    assert found["unary"].units == 1 < found["binary"].units
    assert "same class" in "".join(str(column.header) for column in found["binary"].table().columns)
    with pytest.raises(QsdError, match=r"share=2 is no probability"):
        measure_lost_spikes(spiking, IMAGES, shares=(2,))


def test_comparison_and_float32():
    model = copy.deepcopy(small("csdformer_4_256")).float()
    spiking, images = to_spike_driven(model, code="binary"), torch.randn(4, 3, 24, 24)
    assert (compare_counts(model, spiking, images, "simulate").farthest_first_difference or 0) < 1e-4


# -- files and refusals ------------------------------------------------------------------------------------------------


def test_packed_files_keep_the_code_and_those_without_one_are_unary(tmp_path):
    path = tmp_path / "packed.safetensors"
    for code, spiking in (("unary", small_unary("qsd_tiny")), ("binary", small_binary("qsd_tiny"))):
        save_packed(spiking, path)
        loaded = load_packed(path)
        assert loaded.code.name == code
        assert torch.equal(loaded.simulate(IMAGES).logits, spiking.simulate(IMAGES).logits)
        written = read_packed(path)[0].conversion.model_dump()
        assert written.get("code") == (None if code == "unary" else "binary"), "earlier versions read unary files"


def test_early_firing_is_refused_with_the_reason():
    message = r"has a delay of [01], and in the binary code the first digit of a count"
    with pytest.raises(QsdError, match=f"neuron head_neuron {message}"):
        to_spike_driven(small("csdformer_4_256"), delay={"head_neuron": 1}, code="binary")
    spiking = small_binary("csdformer_4_256")
    for run, arguments in (
        (spiking.simulate, (IMAGES,)),
        (spiking.stream, ([IMAGES],)),
        (audit_spike_driven, (spiking, IMAGES)),
    ):
        with pytest.raises(QsdError, match=message):
            run(*arguments, delay=0)
    with pytest.raises(QsdError, match=message):
        spiking.latency(0)
    with pytest.raises(QsdError, match=message):
        calibrate_delays(spiking, IMAGES, progress=False)
    later = spiking.simulate(IMAGES, delay=4)  # waiting longer than the input lasts changes nothing
    assert torch.equal(later.logits, spiking.simulate(IMAGES).logits)
    with pytest.raises(QsdError, match="code='ternary' is unknown; use 'unary' or 'binary'"):
        to_spike_driven(small("csdformer_4_256"), code="ternary")


def test_a_neuron_whose_threshold_does_not_fall_is_found(monkeypatch):
    # The self-check of a conversion: a neuron that fires at its one threshold in every step fires no digits.
    monkeypatch.setattr("qsd.spiking.codes.BinaryCode.level", lambda self, threshold, step: threshold)
    with pytest.raises(QsdError, match="the simulation differs from the trained network at neuron"):
        to_spike_driven(small("csdformer_4_256"), code="binary")
