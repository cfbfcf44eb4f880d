"""Sums that tie with a threshold where the amplitude is no binary fraction, and half precision."""

import pytest
import torch
from torch import nn

from qsd import QsdError, audit_spike_driven, to_spike_driven
from qsd.layers import QuantConv2d, TokenMeanLinear
from qsd.neurons import LsqNeuron, SpikeNeuron
from qsd.spiking import count_spikes
from tests.helpers.networks import dense_network


def tying_network(time_steps, neuron):
    """Weights that are multiples of 1/8, so that many sums lie exactly in the middle of two counts."""
    layers = []
    for inputs in (3, 8, 8):
        conv = QuantConv2d(inputs, 8, 3, padding=1)
        conv.quantizer.step.data.fill_(1 / 8)
        conv.weight.data = torch.randint(-8, 8, conv.weight.shape) / 8
        layers += [conv, neuron(time_steps)]
        if neuron is LsqNeuron:
            layers[-1].step.data.fill_(0.3)
    return nn.Sequential(*layers, TokenMeanLinear(8, 4)).double().eval()


@pytest.mark.parametrize("neuron", [SpikeNeuron, LsqNeuron])
def test_ties_are_decided_alike_whatever_the_window(neuron):
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    for time_steps in (3, 5, 6, 7, 10):
        model = tying_network(time_steps, neuron)
        spiking = to_spike_driven(model)
        trained, counted, stepped = count_spikes(model, images), count_spikes(spiking, images), {}
        with spiking.runtime.counting(stepped):
            spiking.simulate(images)
        step = 1 / time_steps if neuron is SpikeNeuron else model[3].step.detach()
        drive = model[:3](images) / step
        assert int((((drive % 1) - 0.5).abs() < 1e-9).sum()) > 20, "too few ties"
        for name, counts in trained.items():
            assert torch.equal(counts, counted[name]), (time_steps, name)
            assert torch.equal(counts, stepped[name]), (time_steps, name)


def test_whole_numbers_are_counted_exactly_in_half_precision():
    numbers = torch.arange(256.0)
    for dtype in (torch.bfloat16, torch.float16):
        for neuron in (SpikeNeuron(255, threshold=1.0), LsqNeuron(255)):
            if isinstance(neuron, LsqNeuron):
                neuron.step.data.fill_(1.0)
            x = numbers.to(dtype)
            assert torch.equal(neuron.to(dtype).counts(x).float(), numbers)
            assert torch.equal(neuron(x).float(), numbers)
        below = torch.tensor(0.5, dtype=dtype)
        below = (below.view(torch.int16) - 1).view(dtype)  # the number below one half
        assert SpikeNeuron(7, threshold=1.0).counts(below) == 0
        x = numbers[:128].to(dtype).requires_grad_()  # with codes for the backward pass
        assert torch.equal(SpikeNeuron(127, threshold=1.0)(x).float(), numbers[:128])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_in_half_precision_run_in_every_form(dtype):
    model = dense_network("csdformer_4_256", time_steps=2).to(dtype)
    images = torch.randn(1, 3, 8, 8, dtype=dtype)
    spiking = to_spike_driven(model)
    outputs = spiking(images), spiking.simulate(images).logits, spiking.stream([images]).logits[0]
    assert all(output.dtype == dtype and bool(torch.isfinite(output).all()) for output in outputs)


def test_autocast_is_told_where_it_changes_counts():
    model = tying_network(3, SpikeNeuron).float()
    spiking, images = to_spike_driven(model), torch.randn(1, 3, 6, 6)
    runs = [spiking, spiking.simulate, lambda x: spiking.stream([x]), lambda x: count_spikes(model, x)]
    for run in runs:
        run(images)
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="autocast .* bfloat16"):
            run(images)


def test_images_that_are_not_finite_are_refused_by_steps_and_clock():
    spiking = to_spike_driven(tying_network(2, SpikeNeuron))
    images = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    for value in (float("nan"), float("inf")):
        spoilt = images.clone()
        spoilt[1, 2, 0, 0] = value
        for run in (spiking.simulate, lambda x: spiking.stream([x])):
            with pytest.raises(QsdError, match="image 1 of the batch holds values that are not finite"):
                run(spoilt)
    spoilt[1, 2, 0, 0] = float("nan")
    assert torch.isnan(spiking(spoilt)[1]).all()
    assert torch.equal(spiking(spoilt)[[0, 2]], spiking(images)[[0, 2]])


@pytest.mark.parametrize(
    ("delay", "message"),
    [
        (-1, r"the delay is negative \(-1\)"),
        ({"1": -2}, r"the delay of neuron 1 is negative"),
        ({"7": 1}, "names the neuron '7', which does not exist"),
        ({"head*": 1}, "does not exist"),
        (1.5, "the delay is 1.5; use a whole number"),
        (True, "the delay is True"),
        ({"1": 10**9}, "use a whole number of time steps from 0 to 4096"),
    ],
)
def test_delays_that_no_neuron_can_have_are_refused(delay, message):
    model, images = tying_network(2, SpikeNeuron), torch.randn(1, 3, 6, 6, dtype=torch.float64)
    spiking = to_spike_driven(model)
    for run in (
        lambda: spiking.simulate(images, delay), lambda: spiking.stream([images], delay),
        lambda: spiking.latency(delay), lambda: spiking.interval(delay), lambda: to_spike_driven(model, delay),
        lambda: audit_spike_driven(spiking, images, delay),
    ):  # fmt: skip
        with pytest.raises(QsdError, match=message):
            run()
    spiking.neurons()["1"].delay = -1
    with pytest.raises(QsdError, match="the delay of neuron 1 is negative"):
        spiking.simulate(images)
