"""Sums that tie with a threshold where the amplitude is no binary fraction, and half precision."""

import pytest
import torch
from torch import nn

from qsd import to_spike_driven
from qsd.layers import QuantConv2d, TokenMeanLinear
from qsd.neurons import LsqNeuron, SpikeNeuron
from qsd.spiking import count_spikes


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
        drive = (
            model[2](model[:2](images)) * time_steps
            if neuron is SpikeNeuron
            else model[2](model[:2](images)) / model[3].step.detach()
        )
        assert int((((drive % 1) - 0.5).abs() < 1e-9).sum()) > 20, "too few ties"
        for name, counts in trained.items():
            assert torch.equal(counts, counted[name]), (time_steps, name)
            assert torch.equal(counts, stepped[name]), (time_steps, name)
