"""The clocked run: all layers in every tick, images in a row, the same spikes as layer at a time."""

import pytest
import torch
from torch import nn

from qsd import QsdError
from qsd.layers import conv_norm
from qsd.neurons import SpikeNeuron
from qsd.spiking import to_spike_driven
from tests.helpers.networks import dense_network


@pytest.mark.parametrize("delay", [None, 0, {"*": 3, "*.q_neuron": 5, "s*": 1}], ids=["lossless", "0", "mixed"])
@pytest.mark.parametrize(("name", "time_steps"), [("qsd_tiny", 3), ("qsd_tiny", 4), ("csdformer_4_256", 4)])
def test_two_images_in_a_row_fire_what_each_fires_alone(delay, name, time_steps):
    spiking = to_spike_driven(dense_network(name, time_steps=time_steps, depth=2), merge="rep")
    images = torch.randn(2, 1, 3, 34, 32, dtype=torch.float64)
    alone = [spiking.simulate(image, delay=delay, record="*") for image in images]
    stream = spiking.stream(images, delay=delay, record="*")
    assert len(stream.logits) == 2
    for k, trace in enumerate(alone):
        torch.testing.assert_close(stream.logits[k], trace.logits, rtol=1e-10, atol=1e-12)
        for name, counts in trace.counts.items():
            assert torch.equal(stream.counts[name][k], counts), name


def test_outputs_are_complete_after_the_latency_and_then_once_per_interval():
    spiking = to_spike_driven(dense_network())
    images = torch.randn(3, 1, 3, 32, 32, dtype=torch.float64)
    stream = spiking.stream(images)
    # a neuron is busy for T + d = 7 steps, a matrix k^T v for 2 T - 1 = 7
    assert stream.interval == spiking.interval() == 7
    assert stream.finished == [spiking.latency() + 7 * k for k in range(3)]
    assert spiking.interval(0) == 7, "the matrix stays occupied while the query waits"
    assert spiking.interval(5) == 9
    slower = spiking.stream(images[:2], interval=12)
    assert slower.finished == [spiking.latency(), spiking.latency() + 12]
    assert torch.equal(slower.logits[1], stream.logits[1])


def test_an_interval_below_the_longest_occupation_is_refused():
    spiking = to_spike_driven(dense_network(), delay={"*": 3, "head_neuron": 6})
    with pytest.raises(QsdError, match="interval=9 is too short: head_neuron is occupied for 10 steps"):
        spiking.stream(torch.randn(1, 1, 3, 32, 32, dtype=torch.float64), interval=9)


class TwoStems(nn.Module):
    """An image that is looked at twice, arithmetic on it, and a branch that arrives later than the other."""

    def __init__(self):
        super().__init__()
        self.left, self.right = conv_norm(3, 4, 3), conv_norm(3, 4, 3)
        self.neuron, self.last = SpikeNeuron(3), SpikeNeuron(3)
        self.deep = conv_norm(4, 4, 3)

    def forward(self, x):
        return self.last(self.deep(self.neuron(self.left(2 * x - 1))) + self.right(x))


def test_branches_of_different_length_are_aligned():
    spiking = to_spike_driven(TwoStems().double().eval())
    images = torch.randn(2, 2, 3, 9, 9, dtype=torch.float64)
    stream = spiking.stream(images, record="*")
    for k, image in enumerate(images):
        trace = spiking.simulate(image, record="*")
        assert all(torch.equal(stream.counts[name][k], trace.counts[name]) for name in trace.counts)
        torch.testing.assert_close(stream.logits[k], trace.logits)
