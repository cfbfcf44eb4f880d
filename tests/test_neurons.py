"""The training neuron against exact integer and rational arithmetic."""

from fractions import Fraction
from math import floor

import pytest
import torch
from torch import nn

from qsd import QsdError
from qsd.neurons import SpikeNeuron, build_neuron


@pytest.mark.parametrize("time_steps", [1, 2, 3, 4, 6, 8])
def test_ie_lif_fires_the_rational_count_at_and_around_every_threshold(time_steps):
    neuron = SpikeNeuron(time_steps)
    thresholds = [(k + 0.5) / time_steps for k in range(-1, time_steps + 1)]
    inputs = [t + e for t in thresholds for e in (-1e-6, 0, 1e-6)]
    # The count is decided on fl(T * x), as a threshold of 1/T and T steps prescribe.
    exact = [min(max(floor(Fraction(time_steps * x) + Fraction(1, 2)), 0), time_steps) for x in inputs]
    outputs = neuron(torch.tensor(inputs, dtype=torch.float64))
    assert neuron.counts(torch.tensor(inputs, dtype=torch.float64)).tolist() == exact
    torch.testing.assert_close(outputs, torch.tensor([n / time_steps for n in exact], dtype=torch.float64))


@pytest.mark.parametrize("time_steps", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_neuron_counts_every_integer_like_integer_division(time_steps, dtype):
    threshold = 4 * time_steps**2
    products = torch.arange(0, threshold * (time_steps + 2))
    neuron = SpikeNeuron(time_steps, threshold=float(threshold), amplitude=2 / time_steps)
    exact = ((products + threshold // 2) // threshold).clamp(max=time_steps)
    assert torch.equal(neuron.counts(products.to(dtype)).long(), exact)


def test_slope_is_amplitude_over_threshold_inside_and_zero_outside():
    x = torch.tensor([-1.0, 0.0, 31.0, 100.0, 255.0, 256.0, 300.0], requires_grad=True)
    SpikeNeuron(4, threshold=64.0, amplitude=0.5)(x).sum().backward()
    inside = 0.5 / 64
    assert x.grad.tolist() == [0, 0, inside, inside, inside, 0, 0]


def test_no_state_so_a_sample_s_spikes_do_not_depend_on_its_batch():
    neuron, x = SpikeNeuron(3), torch.randn(5, 7)
    together = neuron(x)
    assert torch.equal(together, torch.stack([neuron(row) for row in x]))
    assert torch.equal(together, neuron(x))
    assert not neuron.state_dict()


def test_the_float_twin_s_neuron_is_a_relu():
    assert isinstance(build_neuron(None, threshold=64.0), nn.ReLU)


@pytest.mark.parametrize("time_steps", [0, -1, 256, 2.5, True])
def test_time_steps_outside_a_byte_are_refused(time_steps):
    with pytest.raises(QsdError, match=r"time_steps=.* from 1 to 255"):
        SpikeNeuron(time_steps)


def test_a_threshold_must_be_positive():
    with pytest.raises(QsdError, match="threshold=0"):
        SpikeNeuron(4, threshold=0)


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_and_window_are_options(lean, dtype):
    # Counts by Python's rounding of fractions, which is half to even; slopes at and beside both ends of the window.
    x = torch.tensor([-0.5, 0.0, 0.5, 1.5, 2.5, 3.5, 4.0, 4.5], dtype=dtype)
    up, even = [0, 0, 1, 2, 3, 4, 4, 4], [min(max(round(v), 0), 4) for v in x.tolist()]
    opened, closed = [0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 0]
    for options, counts, slopes in (
        ({}, up, opened),
        ({"rounding": "half_even"}, even, closed),
        ({"window": "closed"}, up, closed),
        ({"rounding": "half_even", "window": "open"}, even, opened),
    ):
        neuron = SpikeNeuron(4, 1.0, 0.25, **options)
        neuron.lean = lean
        inputs = x.clone().requires_grad_()
        outputs = neuron(inputs)
        outputs.sum().backward()
        assert neuron.counts(x).tolist() == counts
        assert (4 * outputs).tolist() == counts
        assert (4 * inputs.grad).tolist() == slopes
    for options in ({"rounding": "up"}, {"window": "half"}):
        with pytest.raises(QsdError, match="is unknown; use "):
            SpikeNeuron(4, **options)
