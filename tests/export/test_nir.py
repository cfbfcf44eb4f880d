"""NIR graphs: read back and run by a plain interpreter, they fire the network's spikes."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qsd
from qsd.export import to_nir
from qsd.layers import QuantConv2d, QuantLinear
from qsd.neurons import build_neuron
from tests.helpers.exporting import CSD, QSD, spiking_network

nir = pytest.importorskip("nir")
pytest.importorskip("onnxscript")


def order(graph):
    """Names of nodes, each behind all that it hears."""
    sources = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    done = []
    while len(done) < len(sources):
        done += [name for name, needed in sources.items() if name not in done and all(n in done for n in needed)]
    return done, sources


def numbers(values):
    return tuple(int(v) for v in np.broadcast_to(values, 2))


def evaluate(node, x):
    if isinstance(node, nir.Conv2d):
        weight, bias = (torch.from_numpy(v).to(x) for v in (node.weight, node.bias))
        assert not bias.any()  # it would act in every step
        return F.conv2d(x, weight, None, numbers(node.stride), numbers(node.padding), 1, int(node.groups))
    if isinstance(node, nir.Linear):
        return F.linear(x, torch.from_numpy(node.weight).to(x))
    if isinstance(node, nir.SumPool2d):
        size = numbers(node.kernel_size)
        return F.avg_pool2d(x, size, numbers(node.stride), numbers(node.padding), divisor_override=1)
    if isinstance(node, nir.AvgPool2d):
        return F.avg_pool2d(x, numbers(node.kernel_size), numbers(node.stride), numbers(node.padding))
    if isinstance(node, nir.Flatten):
        return x.flatten(1)
    assert isinstance(node, nir.Threshold | nir.Output), node
    return (x > torch.from_numpy(node.threshold).to(x)).to(x) if isinstance(node, nir.Threshold) else x


def simulate(path, images):
    """Sums over all steps at the output, and how often every neuron fired; soft reset, no floor, step by step."""
    graph, schedule = nir.read(path), json.loads((path.parent / f"{path.name}.json").read_text())
    names, sources = order(graph)
    membranes, counts = {}, {}
    for step in range(1, schedule["steps"] + 1):
        values = {}
        for name in names:
            node = graph.nodes[name]
            if name == "image":
                values[name] = images * (step <= schedule["time_steps"])
            elif name in schedule["clocks"]:
                clock = schedule["clocks"][name]
                feed = images.new_zeros(tuple(node.input_type["input"]))
                feed[0] = clock["pulses"].get(str(step), 0)
                if step == 1:
                    start = torch.tensor(clock["start"])
                    for k in range(len(feed) - 1):
                        feed[1 + k] = start == k
                values[name] = feed.expand(len(images), *feed.shape)
            else:
                x = sum(values[source] for source in sources[name])
                if isinstance(node, nir.IF | nir.I):
                    x = membranes[name] = membranes.get(name, 0) + x
                if isinstance(node, nir.IF):
                    values[name] = (x > torch.from_numpy(node.v_threshold).to(x)).to(x)
                    membranes[name] = x - values[name] * torch.from_numpy(node.v_threshold).to(x)
                    counts[name] = counts.get(name, 0) + values[name]
                else:
                    values[name] = x if isinstance(node, nir.I) else evaluate(node, x)
    return values["output"], counts


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


def parts():
    csd, images = spiking_network(*CSD, part="stem")
    yield csd, images
    for merge in (True, False):
        yield spiking_network(QSD[0], QSD[1], part="stem", merge=merge)


@pytest.mark.parametrize("which", range(3), ids=["csdformer", "qsd merged", "qsd factors"])
def test_tokenizers_fire_the_same_spikes_and_give_the_same_sums(which, tmp_path):
    spiking, images = list(parts())[which]
    spiking = spiking.double()
    to_nir(spiking, tmp_path / "a.nir")
    sums, counts = simulate(tmp_path / "a.nir", images.double())
    expected = qsd.count_spikes(spiking, images.double())
    assert counts.keys() == expected.keys()
    for name, count in expected.items():
        assert float((counts[name] != count).double().mean()) < 1e-4, name  # the file holds float32
    torch.testing.assert_close(sums, spiking(images.double()), rtol=1e-3, atol=1e-3)


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
    assert schedule["steps"] == 4 + 3 * 3  # T, and three neurons one behind the other that wait T - 1


@pytest.mark.parametrize("network", [QSD, CSD], ids=["qsd", "csdformer"])
def test_attention_is_refused_by_name_and_nothing_is_left(network, tmp_path):
    spiking, _ = spiking_network(*network)
    with pytest.raises(qsd.QsdError, match=r"NIR has no product of two activations, .*attn.*model.stem"):
        to_nir(spiking, tmp_path / "a.nir")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_named(tmp_path):
    spiking, _ = spiking_network(*CSD, part="stem", delay=1)
    with pytest.raises(qsd.QsdError, match="fires before its input is complete"):
        to_nir(spiking, tmp_path / "a.nir")
    flattened = nn.Sequential(QuantConv2d(3, 2, 3, weight_bits=4), build_neuron(4), nn.Flatten(), QuantLinear(8, 5))
    with pytest.raises(qsd.QsdError, match=r"cannot express the operation (Flatten|Reshape) behind 1;"):
        to_nir(qsd.to_spike_driven(flattened.eval(), example=torch.rand(1, 3, 4, 4)), tmp_path / "a.nir")
    with pytest.raises(qsd.QsdError, match="does not exist; make it first"):
        to_nir(spiking, tmp_path / "none" / "a.nir")
