"""NIR graphs that are read back and run by a plain interpreter fire the spikes of the network."""

import json

import pytest
import torch
from torch import nn

import qsd
from qsd.export import to_nir
from qsd.layers import QuantConv2d, QuantLinear
from qsd.neurons import build_neuron
from tests.helpers import sample
from tests.helpers.exporting import CSD, ESF, QSD, spiking_network
from tests.helpers.nir_interpreter import simulate

pytest.importorskip("nir")
pytest.importorskip("onnxscript")


class Small(nn.Module):
    """A user's classifier: strides, a max-pool, a residual connection, a mean over positions."""

    def __init__(self):
        super().__init__()
        self.conv1 = QuantConv2d(3, 8, 3, stride=2, padding=1, weight_bits=4)
        self.fire1, self.pool = build_neuron(4), nn.MaxPool2d(3, 2, 1)
        self.conv2 = QuantConv2d(8, 8, 3, padding=1, weight_bits=4)
        self.fire2 = build_neuron(4)
        self.conv3 = QuantConv2d(8, 8, 1, weight_bits=4)
        self.fire3 = build_neuron(4)
        self.head = QuantLinear(8, 5, weight_bits=4)

    def forward(self, x):
        x = self.conv2(self.pool(self.fire1(self.conv1(x))))
        x = x + self.conv3(self.fire2(x))
        return self.head(self.fire3(x.mean((2, 3))))


@pytest.mark.parametrize(
    ("network", "merge"), sample([(CSD, True), (QSD, False)], [(CSD, True), (QSD, True), (QSD, False), (ESF, False)])
)
def test_tokenizers_fire_the_same_spikes_and_give_the_same_sums(network, merge, tmp_path):
    spiking, images = spiking_network(*network, part="stem", merge=merge)
    spiking = spiking.double()
    to_nir(spiking, tmp_path / "a.nir")
    sums, counts = simulate(tmp_path / "a.nir", images.double())
    expected = qsd.count_spikes(spiking, images.double())
    assert counts.keys() == expected.keys()
    for name, count in expected.items():
        assert float((counts[name] != count).double().mean()) < 1e-4, name  # The file holds float32.
    torch.testing.assert_close(sums, spiking(images.double()), rtol=1e-3, atol=1e-3)


def test_a_neuron_that_rounds_to_even_is_refused_by_name(tmp_path):
    spiking, _ = spiking_network(ESF[0], {**ESF[1], "rounding": "half_even"}, part="stem")
    with pytest.raises(qsd.QsdError, match=r"neuron blocks\.0\.\S+ rounds halves to even.*rounding='half_up'"):
        to_nir(spiking, tmp_path / "a.nir")


def test_a_classifier_of_ones_own_gives_the_same_counts_and_logits(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(6, 3, 18, 14, dtype=torch.float64) * 4
    spiking = qsd.to_spike_driven(Small().double().eval(), example=images[:1])
    plan = to_nir(spiking, tmp_path / "a.nir", notes={"class_names": ["cat"]})
    logits, counts = simulate(tmp_path / "a.nir", images)
    expected = qsd.count_spikes(spiking, images)
    assert sum(int(c.sum()) for c in expected.values()) > 500
    for name, count in expected.items():
        assert float((counts[name] != count).double().mean()) < 1e-3, name
    torch.testing.assert_close(logits, spiking(images), rtol=1e-3, atol=1e-3)
    schedule = json.loads(plan.read_text())
    assert schedule["notes"] == {"class_names": ["cat"]}
    assert schedule["steps"] == 4 + 3 * 3  # T, and three neurons in a row that wait T - 1 each.


@pytest.mark.parametrize("network", sample([CSD], [QSD, CSD]))
def test_attention_is_refused_by_name_and_nothing_is_left(network, tmp_path):
    spiking, _ = spiking_network(*network)
    with pytest.raises(qsd.QsdError, match=r"NIR has no product of two activations, .*attn.*model.stem"):
        to_nir(spiking, tmp_path / "a.nir")
    assert not list(tmp_path.iterdir())


class RowMeans(nn.Sequential):
    """A network whose mean is taken over one axis of the positions."""

    def forward(self, x):
        return self[2](self[1](self[0](x).mean(3)))


def test_a_mean_that_is_not_over_all_positions_is_refused(tmp_path):
    model = RowMeans(QuantConv2d(3, 2, 3, padding=1, weight_bits=4), build_neuron(4), QuantLinear(8, 5, weight_bits=4))
    spiking = qsd.to_spike_driven(model.eval(), example=torch.rand(1, 3, 8, 8))
    with pytest.raises(qsd.QsdError, match="cannot express the operation ReduceMean behind 0"):
        to_nir(spiking, tmp_path / "a.nir")


def test_mistakes_are_named(tmp_path):
    spiking, _ = spiking_network(*CSD, part="stem", delay=1)
    with pytest.raises(qsd.QsdError, match="fires before its input is complete"):
        to_nir(spiking, tmp_path / "a.nir")
    stem = spiking_network(*CSD, part="stem", code="binary")[0]
    with pytest.raises(qsd.QsdError, match="one threshold for all time steps, which the binary code does not"):
        to_nir(stem, tmp_path / "a.nir")
    flattened = nn.Sequential(QuantConv2d(3, 2, 3, weight_bits=4), build_neuron(4), nn.Flatten(), QuantLinear(8, 5))
    with pytest.raises(qsd.QsdError, match=r"cannot express the operation (Flatten|Reshape) behind 1;"):
        to_nir(qsd.to_spike_driven(flattened.eval(), example=torch.rand(1, 3, 4, 4)), tmp_path / "a.nir")
    with pytest.raises(qsd.QsdError, match="does not exist; make it first"):
        to_nir(spiking, tmp_path / "none" / "a.nir")
