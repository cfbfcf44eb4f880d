"""One-step functions against exhaustive and integer arithmetic."""

import itertools
from fractions import Fraction

import pytest
import torch

from qsd.neurons import SpikeNeuron
from qsd.spiking.layers import DelayedNeuron, HalfEvenNeuron
from qsd.spiking.runtime import Runtime
from qsd.spiking.steps import fire, pool_increment, product_increment


def integrate(currents, threshold, delay):
    """The delayed neuron over its window, by the module that networks use: ``[T, M]`` to spikes ``[T, M]``."""
    steps = len(currents)
    runtime = Runtime(steps)
    neuron = DelayedNeuron(SpikeNeuron(steps, threshold=float(threshold)), "n", delay, runtime)
    with runtime.running("step"):
        return neuron(currents.flatten(0, 1)).view(currents.shape)


@pytest.mark.parametrize("time_steps", [1, 2, 3, 4])
def test_the_delayed_neuron_obeys_its_closed_form_for_every_sequence(time_steps):
    # Theorem: with Q = clip(k, 0, T), k = floor(sum / theta + 1/2), and n0 spikes before the last input, it fires
    # clip(k, n0, n0 + d + 1) spikes; |N - Q| <= T - 1 - d, attained; equal for every input iff d >= T - 1.
    threshold = 4
    sequences = torch.tensor(list(itertools.product(range(-12, 13, 4), repeat=time_steps)), dtype=torch.float64).T
    k = torch.floor(sequences.sum(0) / threshold + 0.5)
    quantized = k.clamp(0, time_steps)
    for delay in range(time_steps + 2):
        spikes = integrate(sequences, threshold, delay)
        before = spikes[: max(0, time_steps - 1 - delay)].sum(0)
        count = spikes.sum(0)
        assert torch.equal(count, torch.minimum(torch.maximum(k, before), before + min(time_steps, delay + 1)))
        assert (count - quantized).abs().max() == max(0, time_steps - 1 - delay)
        if delay >= time_steps - 1:  # all input is in: the spikes are contiguous from the first step
            assert torch.equal(spikes, (torch.arange(time_steps)[:, None] < count).double())


def test_a_constant_current_needs_no_delay():
    total = torch.arange(-200, 400, dtype=torch.float64)
    for time_steps in (1, 2, 4, 8):
        currents = (total / time_steps).repeat(time_steps, 1)  # binary fractions: exact
        counts = integrate(currents, 64, 0).sum(0)
        assert torch.equal(counts, torch.floor(total / 64 + 0.5).clamp(0, time_steps))


@pytest.mark.parametrize("code", ["unary", "binary"])
@pytest.mark.parametrize("time_steps", [1, 2, 3, 4, 8])
def test_halves_round_to_even_counts_if_some_spikes_need_more_than_the_threshold(time_steps, code):
    # Python rounds fractions half to even. Ties are half of the sums here, and the currents come in any order.
    threshold, runtime = 4, Runtime(time_steps, code)
    trained = SpikeNeuron(time_steps, float(threshold), 1.0, rounding="half_even")
    neuron = HalfEvenNeuron(trained, "n", runtime.code.lossless_delay, runtime)
    sums = torch.arange(-12, threshold * (time_steps + 2), 2, dtype=torch.float64)
    expected = [min(max(round(Fraction(int(z), threshold)), 0), time_steps) for z in sums]
    currents = torch.randint(-20, 20, (runtime.code.steps, len(sums))).double()
    currents[-1] += sums - currents.sum(0)
    with runtime.running("step"):
        spikes = neuron(currents.flatten()).view(runtime.code.steps, -1)
    assert runtime.code.counts(spikes).tolist() == expected
    assert neuron.count(sums).tolist() == expected


@pytest.mark.parametrize("deviation", ["hard reset", "floor at zero", "start at zero", "strict threshold"])
def test_every_simplification_of_the_neuron_breaks_exactness(deviation):
    # So that nobody "simplifies" to them: each fires other counts on some input, at the lossless delay.
    time_steps, threshold = 4, 4.0
    currents = torch.randint(-10, 14, (time_steps, 5000)).double()
    membrane = torch.full((5000,), 0.0 if deviation == "start at zero" else threshold / 2, dtype=torch.float64)
    for current in currents:
        membrane = membrane + current
        if deviation == "floor at zero":
            membrane = membrane.clamp(min=0)
    count = torch.zeros(5000, dtype=torch.float64)
    for _ in range(time_steps):
        spikes = torch.empty_like(membrane)
        fire(membrane.clone(), threshold, spikes)
        spikes = membrane > threshold if deviation == "strict threshold" else spikes.bool()
        membrane = membrane.where(~spikes, torch.tensor(0.0) if deviation == "hard reset" else membrane - threshold)
        count += spikes
    exact = integrate(currents, threshold, time_steps - 1).sum(0)
    assert torch.equal(exact, torch.floor(currents.sum(0) / threshold + 0.5).clamp(0, time_steps))
    assert (count != exact).double().mean() > 0.02


@pytest.mark.parametrize("lead", [0, 1, 3])
def test_increments_add_up_to_the_product_of_counts_also_when_windows_are_offset(lead):
    steps = 4 + lead
    left, right = torch.zeros(steps, 2, 3, 5, 7), torch.zeros(steps, 2, 3, 7, 6)
    left[:4] = torch.randint(0, 2, left[:4].shape)
    right[lead:] = torch.randint(0, 2, right[lead:].shape)
    left_sum, right_sum = torch.zeros_like(left[0]), torch.zeros_like(right[0])
    total = torch.zeros(2, 3, 5, 6)
    for x, y in zip(left, right):
        increment, left_sum, right_sum = product_increment(x, y, left_sum, right_sum)
        total += increment
    slow = torch.einsum("bhic,bhcj->bhij", left.sum(0).long(), right.sum(0).long())
    assert torch.equal(total.long(), slow)


def random_trains(steps, lead=0):
    """Binary ``[steps, B, C, H, W]``; half of the channels come later."""
    spikes = torch.zeros(steps + lead, 2, 4, 7, 6, dtype=torch.float64)
    spikes[:steps, :, :2] = torch.randint(0, 2, spikes[:steps, :, :2].shape)
    spikes[lead:, :, 2:] = torch.randint(0, 2, spikes[lead:, :, 2:].shape)
    return spikes


@pytest.mark.parametrize("lead", [0, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_increments_of_a_max_pool_are_binary_and_add_up_to_the_largest_count(lead, stride):
    def pool(x):
        return torch.nn.functional.max_pool2d(x, 3, stride, 1)

    spikes = random_trains(4, lead)
    spike_sum = pooled_sum = None
    total = torch.zeros_like(pool(spikes[0]))
    for x in spikes:
        increment, spike_sum, pooled_sum = pool_increment(x, spike_sum, pooled_sum, pool)
        assert set(increment.unique().tolist()) <= {0, 1}
        total += increment
    assert torch.equal(total, pool(spikes.sum(0)))


def test_simplifications_of_the_max_pool_count_too_many():
    # Random trains, 3x3 windows, T = 4: "any of them fires" over-counts in 45 % of windows; passing a spike on if its
    # neuron's count reaches the largest one does in 40 %, because a second neuron that ties passes again.
    trains = torch.randint(0, 2, (4, 50, 4, 8, 8), generator=torch.Generator().manual_seed(0)).double()
    windows = trains.unfold(3, 3, 1).unfold(4, 3, 1).flatten(-2)  # [T, ..., 9]
    exact = windows.sum(0).amax(-1)
    sums = windows.cumsum(0)
    any_of_them = windows.amax(-1).sum(0)
    gated = (windows * (sums == sums.amax(-1, keepdim=True))).amax(-1).sum(0)
    for wrong in (any_of_them, gated):
        assert bool((wrong >= exact).all())
        assert 0.3 < (wrong > exact).double().mean() < 0.6
    # without gaps, as at delay T - 1, any of them is right
    contiguous = torch.arange(4).view(4, 1, 1, 1, 1, 1) < windows.sum(0)
    assert torch.equal(contiguous.double().amax(-1).sum(0), exact)
