"""Bits and picojoules of memory, counted on paper and by another package."""

import csv
import io
import warnings

import pytest
import torch
from torch import nn

from qsd import QsdError, measure_energy, to_spike_driven
from qsd.energy import Memory, Prices, preset_prices, read_prices
from qsd.layers import MatrixProduct, QuantConv2d, QuantLinear, SpikeProduct
from qsd.neurons import SpikeNeuron
from qsd.report import ConversionOptions
from tests.helpers.networks import dense_network

KINDS = ("weights_read", "membranes_read", "membranes_written", "activations_read", "activations_written")


def four_bits(layer, weight):
    """Weights on the grid of steps of a quarter."""
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight).view_as(layer.weight))
        layer.quantizer.step.fill_(0.25)
    return layer


class Paper(nn.Module):
    """Two layers and an attention of two tokens and one head of two channels, all with weights of 4 bits."""

    def __init__(self):
        super().__init__()
        self.stem = four_bits(QuantConv2d(1, 2, 1), [1.0, 0.5])
        self.q_neuron, self.k_neuron, self.v_neuron = (SpikeNeuron(4, None, 1.0) for _ in range(3))
        self.key_value, self.query = SpikeProduct(), MatrixProduct()
        self.attn_neuron = SpikeNeuron(4, 64.0, 0.5)
        self.head = four_bits(QuantLinear(4, 3, bias=False), [0.5] * 12)

    def forward(self, x):
        currents = self.stem(x)
        q, k, v = (neuron(currents).flatten(2) for neuron in (self.q_neuron, self.k_neuron, self.v_neuron))
        product = self.query(self.key_value(v, k.transpose(1, 2)), q)
        return self.head(self.attn_neuron(product).flatten(1))


# Image [1, 1/2], counts [[4, 2], [2, 1]] for q, k and v: 9 spikes, 4 values that are not zero. k^T v is
# [[20, 10], [10, 5]], the product [[100, 50], [50, 25]], its counts (threshold 64) [[2, 1], [1, 0]]: 4 spikes, 3
# values.
#
# Widths: counts 0..4 have 3 bits, pixels 8. The stem's sums are at most 255 * 2^3 = 2040, 11 bits and a sign. k^T v is
# at most 2 * 4 * 4 = 32, 6 bits; the product at most 2 * 32 * 4 = 256, 9 bits; the head's sums at most
# 4 * 4 * 2^3 = 128, 8 bits and a sign. An address has 1 bit in the image and 2 bits elsewhere, for 4 neurons.
# The stem stores 2 * 4 + 4 * 32 = 136 bits, the head 12 * 4 + 6 * 32 = 240.
ON_PAPER = {
    "spiking": {
        "events": {
            # 4 weights and 4 biases; 4 sums; the current of 4 neurons charges them 4 times: it is read, and they are
            "stem": (4 * 4 + 4 * 32, 4 * 12 + 2 * 16 * 12, 8 * 12 + 16 * 12, 2 * (1 + 8), 0),
            # each of 18 spikes fetches 2 running sums of 3 bits, is added to 2 sums of 6 and raises its own of 3;
            # two layers of neurons are compared 4 times, and lowered by 9 spikes each
            "key_value": (36 * 3, 36 * 6 + 54 + 2 * 16 * 12, 40 * 6 + 54 + 2 * 9 * 12, 18 * 2, 18 * 2),
            "query": (18 * 6, 18 * 9 + 16 * 12, 22 * 9 + 9 * 12, 9 * 2, 9 * 2),
            "head": (12 * 4 + 3 * 32, 12 * 9 + 16 * 9, 15 * 9 + 4 * 9, 4 * 2, 4 * 2),
        },
        "reuse": {
            "stem": (136, 2 * 16 * 12, 4 * 12 + 16 * 12, 2 * 8, 0),
            "key_value": (0, 4 * (24 + 24) + 2 * 16 * 12, 4 * (24 + 24) + 2 * 16 * 12, 4 * 8, 2 * 16),
            "query": (4 * 4 * 6, 16 * 9 + 16 * 12, 16 * 9 + 16 * 12, 16, 16),
            "head": (4 * 240, 12 * 9 + 16 * 9, 12 * 9 + 16 * 9, 16, 16),
        },
    },
    "integer": {
        "events": {
            "stem": (4 * 4 + 4 * 32, 4 * 12, 8 * 12, 2 * (1 + 8), 0),
            # 4 values meet rows of 2; both neurons read 4 sums and write 4 values with their address
            "key_value": (8 * 3, 8 * 6 + 2 * 4 * 12, 12 * 6, 4 * (2 + 3), 2 * 4 * (2 + 3)),
            "query": (8 * 6, 8 * 9 + 4 * 12, 12 * 9, 4 * (2 + 3), 4 * (2 + 3)),
            "head": (9 * 4 + 3 * 32, 9 * 9 + 4 * 9, 12 * 9, 3 * (2 + 3), 3 * (2 + 3)),
        },
        "reuse": {
            "stem": (136, 0, 4 * 12, 2 * 8, 0),
            "key_value": (4 * 3, 2 * 4 * 12, 4 * 6, 4 * 3, 2 * 4 * 3),
            "query": (4 * 6, 4 * 12, 4 * 9, 4 * 3, 4 * 3),
            "head": (240, 4 * 9, 3 * 9, 4 * 3, 4 * 3),
        },
    },
    "float_twin": {
        "events": {
            "stem": (8 * 32, 4 * 32, 8 * 32, 2 * (1 + 32), 0),
            "key_value": (8 * 32, 8 * 32 + 2 * 4 * 32, 12 * 32, 4 * (2 + 32), 2 * 4 * (2 + 32)),
            "query": (8 * 32, 8 * 32 + 4 * 32, 12 * 32, 4 * (2 + 32), 4 * (2 + 32)),
            "head": (12 * 32 + 3 * 32, 12 * 32 + 4 * 32, 15 * 32, 4 * (2 + 32), 4 * (2 + 32)),
        },
        "reuse": {
            "stem": (4 * 32, 0, 4 * 32, 2 * 32, 0),
            "key_value": (4 * 32, 2 * 4 * 32, 4 * 32, 4 * 32, 2 * 4 * 32),
            "query": (4 * 32, 4 * 32, 4 * 32, 4 * 32, 4 * 32),
            "head": (15 * 32, 4 * 32, 3 * 32, 4 * 32, 4 * 32),
        },
    },
}
# Of 64 bits in a memory of 200 bits, which holds all but the head (240 + 3 * 9 + 4 bits in the spiking network).
SMALL = Prices(
    source="made up", mac_pj=4.6, ac_pj=0.9, memories=[Memory(kib=200 / 8192, pj=16.0)], dram_pj=[64.0, 128.0]
)


def test_bits_and_picojoules_that_can_be_counted_on_paper():
    image = torch.tensor([1.0, 0.5], dtype=torch.float64).view(1, 1, 1, 2)
    spiking = to_spike_driven(Paper().double().eval(), example=image)
    energy = measure_energy(spiking, image, progress=False, prices=SMALL)
    layers = {layer.name: layer for layer in energy.layers}
    assert list(layers) == ["stem", "key_value", "query", "head"]
    totals = energy.with_memory_mj
    operations = {  # multiply-accumulates and additions
        ("spiking", "events"): (4, 36 + 18 + 12), ("spiking", "reuse"): (4, 36 + 18 + 12),
        ("integer", "events"): (4 + 8 + 8 + 9, 0), ("integer", "reuse"): (4 + 8 + 8 + 12, 0),
        ("float_twin", "events"): (32, 0), ("float_twin", "reuse"): (32, 0),
    }  # fmt: skip
    for kind, flows in ON_PAPER.items():
        for network in ("merged", "unmerged") if kind == "spiking" else (kind,):
            for flow, rows in flows.items():
                for name, bits in rows.items():
                    assert tuple(layers[name].moved[network][flow][key] for key in KINDS) == bits, (network, flow, name)
                macs, additions = operations[kind, flow]
                assert totals[network][flow]["arithmetic"] == pytest.approx((4.6 * macs + 0.9 * additions) * 1e-9)
    # All but the head's own bits lie in the small memory, at 1/4 pJ a bit; the head's cost 1 to 2 pJ.
    for flow, flows in ON_PAPER["spiking"].items():
        of_neuron = {"events": 16 * 9 + 4 * 9 + 4 * 2, "reuse": 2 * 16 * 9 + 16}[flow]
        everything, head = sum(map(sum, flows.values())), sum(flows["head"]) - of_neuron
        low, high = totals["merged"][flow]["memory"]
        assert low == pytest.approx(((everything - head) / 4 + head) * 1e-9)
        assert high == pytest.approx(((everything - head) / 4 + 2 * head) * 1e-9)
    assert all(layer.memory_mj["merged"]["reuse"][0] > 0 for layer in energy.layers)
    assert energy.verdict.startswith("With memory, event by event ")
    assert "integers win by" in energy.verdict
    rows = list(csv.DictReader(io.StringIO(energy.to_csv())))
    assert len(rows) == 4 * 4 * 2
    row = next(r for r in rows if (r["layer"], r["network"], r["dataflow"]) == ("head", "integer", "events"))
    assert float(row["weights_read_bits"]) == 9 * 4 + 3 * 32
    metrics = energy.neurobench
    assert metrics["synaptic_operations"] == {"Effective_MACs": 4, "Effective_ACs": 66, "Dense": 4 + 4 * 28}
    assert metrics["activation_sparsity"] == pytest.approx(1 - (3 * 9 + 4) / (16 * 4))
    assert metrics["footprint"] == (136 + 240) / 8
    assert metrics["connection_sparsity"] == 0
    assert metrics["membrane_updates"] == 16 * 4 + 31


def test_spikes_win_below_the_break_even_rate():
    torch.manual_seed(0)
    spiking = to_spike_driven(dense_network())
    energy = measure_energy(spiking, torch.randn(2, 3, 32, 32, dtype=torch.float64), progress=False)
    checked = 0
    for layer in energy.layers:
        for flow, mj in layer.memory_mj["merged"].items():
            mine = mj[0] + layer.arithmetic_mj["merged"][flow]
            other = layer.memory_mj["integer"][flow][0] + layer.arithmetic_mj["integer"][flow]
            rate = layer.break_even.get(flow)
            if rate is not None and 0 < rate < 1:
                assert (mine < other) == (layer.rate < rate), (layer.name, flow)
                checked += 1
        rate = layer.break_even.get("arithmetic")
        if rate and rate < 1:
            assert (layer.energy_mj["merged"] < layer.energy_mj["integer"]) == (layer.rate < rate), layer.name
            checked += 1
    assert checked > 10


def test_a_memory_is_chosen_by_what_it_has_to_hold():
    prices = preset_prices("int8")
    assert (prices.mac_pj, prices.ac_pj, prices.float_mac_pj) == (0.23, 0.03, 4.6)
    for kib, price in ((8, 10), (32, 20), (1024, 100)):
        assert prices.per_bit(kib * 8192) == (price / 64, price / 64)
    assert prices.per_bit(1024 * 8192 + 1) == (1300 / 64, 2600 / 64)


GOOD = """source: my chip
mac_pj: 1
ac_pj: 0.5
memories:
  - {kib: 64, pj: 5}
dram_pj: [100, 200]
"""


def test_prices_are_read_from_a_file_and_mistakes_are_one_line(tmp_path):
    path = tmp_path / "prices.yaml"
    path.write_text(GOOD)
    prices = read_prices(path)
    assert (prices.source, prices.mac_pj, prices.per_bit(1), prices.float_mac_pj) == (
        "my chip",
        1,
        (5 / 64, 5 / 64),
        4.6,
    )
    for text, message in [
        ("mac_pj: [", "is no YAML"),
        ("- 1", "holds a list instead of fields"),
        (GOOD.replace("source: my chip\n", ""), "does not fit at source: field required"),
        (GOOD.replace("mac_pj: 1", "mac_pj: -1"), "does not fit at mac_pj"),
        (GOOD.replace("ac_pj: 0.5", "ac_pj: .nan"), "does not fit at ac_pj"),
        (GOOD.replace("[100, 200]", "[200, 100]"), "dram_pj must be the lower and the upper end"),
        (GOOD.replace("dram_pj: [100, 200]", "dram_pj: 100"), "does not fit at dram_pj"),
        (GOOD.replace("{kib: 64, pj: 5}", "{kib: 64, pj: 5}\n  - {kib: 8, pj: 1}"), "memories must become larger"),
        (GOOD + "price: 1\n", "does not fit at price"),
    ]:
        path.write_text(text)
        with pytest.raises(QsdError, match=message) as error:
            read_prices(path)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(QsdError, match="does not exist"):
        ConversionOptions(prices=str(tmp_path / "none.yaml"))


class Convolutional(nn.Module):
    """Two convolutions and a classifier of float weights, with biases, as the other package counts them."""

    def __init__(self):
        super().__init__()
        self.stem = QuantConv2d(1, 3, 3, padding=1, weight_bits=None)
        self.neuron1, self.neuron2 = SpikeNeuron(4, 0.3), SpikeNeuron(4, 0.3)
        self.conv = QuantConv2d(3, 5, 3, stride=2, padding=1, bias=True, weight_bits=None)
        self.head = QuantLinear(5 * 16, 7, bias=True, weight_bits=None)

    def forward(self, x):
        return self.head(self.neuron2(self.conv(self.neuron1(self.stem(x)))).flatten(1))


def test_spikingjelly_counts_the_same_where_its_assumptions_are_ours():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counters = pytest.importorskip("spikingjelly.activation_based.op_counter")
        from spikingjelly.activation_based import layer as layers
        from spikingjelly.activation_based.neuron import IFNode

    class Replayed(IFNode):
        """A neuron that fires spikes which were recorded before."""

        def __init__(self, spikes):
            super().__init__(step_mode="m")
            self.recorded = spikes
            self.v = torch.zeros_like(spikes[0])

        def forward(self, x):
            return self.recorded

    torch.manual_seed(0)
    model, image = Convolutional().eval(), torch.rand(1, 1, 8, 8)
    spiking = to_spike_driven(model, example=image)
    trace = spiking.simulate(image, record="*")
    energy = {layer.name: layer for layer in measure_energy(spiking, image, progress=False).layers}
    first, second = (trace.spikes[f"neuron{i}"].float() for i in (1, 2))
    conv = layers.Conv2d(3, 5, 3, 2, 1, step_mode="m")
    network = nn.Sequential(Replayed(first), conv, Replayed(second), layers.Linear(80, 7, step_mode="m"))
    flat = nn.Sequential(*network[:3]), network[3]

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolutional, self.head = flat

        def forward(self, x):
            return self.head(self.convolutional(x).flatten(2))

    network, currents = Whole(), torch.ones_like(first)
    rows = [energy["conv"], energy["head"]]

    # The analytical model: the same operations, addresses and accesses, at the same prices.
    report = counters.estimate_lemaire_energy(network, currents)
    assert sum(row.energy_mj["lemaire"] for row in rows) * 1e9 == pytest.approx(report.total_pj)

    # Memory of spikes: weights by their true fan-out. Two assumptions differ. A bias is read by it in every step, and
    # by us once per image, when an accumulator begins; membranes move by it once per step, and by us a second time for
    # the charge, which belongs to the synapse. Without the synapse's part they are equal.
    counter = counters.NeuromorphicMemoryAccessCounter()
    with counters.ModuleCounterMode([counter], model=network), torch.no_grad():
        network(currents)
    counted = counter.get_counts()["Global"]
    outputs = second[0].numel() + 7
    weights = sum(row.moved["merged"]["events"]["weights_read"] for row in rows) - 32 * outputs
    assert weights == 8 * counted["weight_read_bytes"]
    assert counted["bias_read_bytes"] == 4 * outputs * 4
    for key, theirs in (
        ("membranes_read", "neuron_state_read_bytes"),
        ("membranes_written", "neuron_state_write_bytes"),
    ):
        moved = sum(row.moved["merged"]["reuse"][key] for row in rows)
        assert moved - 4 * 32 * outputs == 8 * counted[theirs]

    # Memory of an ordinary network: inputs, weights and outputs once each, as the float twin with best reuse.
    counter = counters.MemoryAccessCounter()
    counts = first.sum(0)
    with counters.DispatchCounterMode([counter]), torch.no_grad():
        nn.Conv2d(3, 5, 3, 2, 1)(counts)
    moved = energy["conv"].moved["float_twin"]["reuse"]
    ours = moved["weights_read"] + moved["activations_read"] + moved["membranes_written"]
    assert ours == 8 * counter.records["Global"][torch.ops.aten.convolution.default]
