"""Comparing a trained network with its spiking form, and choosing delays by measurement."""

import pytest
import torch
from torch import nn

from qsd import (
    QsdError,
    audit_spike_driven,
    calibrate_delays,
    compare_counts,
    count_spikes,
    measure_energy,
    to_spike_driven,
)
from qsd.layers import QuantConv2d, QuantLinear
from qsd.neurons import SpikeNeuron
from qsd.precision import full_float32, tf32_note
from qsd.spiking.lost_spikes import measure_lost_spikes
from tests.helpers.networks import dense_network

IMAGES = torch.randn(6, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("way", ["count", "simulate"])
def test_in_float64_nothing_differs(way):
    model = dense_network()
    comparison = compare_counts(model, to_spike_driven(model), [IMAGES[:4], IMAGES[4:]], way)
    assert comparison.equal_counts
    assert comparison.farthest_first_difference is None
    assert comparison.to_dict() == {
        "dtype": "float64", "way": way, "images": 6, "changed_images": 0, "equal_classes": 6,
        "farthest_first_difference": None, "equal_counts": True, "class_agreement": 1.0,
    }  # fmt: skip


def test_in_float32_the_first_neurons_that_differ_lie_on_a_threshold():
    stem, head = QuantConv2d(1, 1, 1, weight_bits=None), QuantLinear(1024, 4)
    nn.init.ones_(stem.weight)
    model = nn.Sequential(stem, SpikeNeuron(3, 1.0), nn.Flatten(), head).eval()
    # membranes within rounding (2^-24 of their size) of the thresholds at 1/2, 3/2 and 5/2
    images = torch.randint(0, 3, (4, 1, 32, 32)) + 0.5 + torch.empty(4, 1, 32, 32).uniform_(-2e-7, 2e-7)
    spiking = to_spike_driven(model)
    comparison = compare_counts(model, spiking, images, "simulate")
    assert comparison.dtype == "float32"
    assert comparison.changed_images == 4, "the sum of three thirds is rounded three times"
    assert 0 < comparison.farthest_first_difference < 1e-6
    exact = compare_counts(model.double(), spiking.double(), images.double() + 1e-10, "simulate")
    assert exact.equal_counts


@pytest.fixture(params=["fp32_precision", "allow_tf32"])
def setting(request, monkeypatch):
    """PyTorch's switch of TF32 for products, turned on: since 2.9, and before."""
    place, name = torch.backends.cuda.matmul, request.param
    if name == "allow_tf32":
        monkeypatch.delattr(type(torch.backends.cudnn), "conv", raising=False)
    elif not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this PyTorch has the old one alone")
    before = getattr(place, name)
    setattr(place, name, True if name == "allow_tf32" else "tf32")
    yield lambda: getattr(place, name)
    setattr(place, name, before)


def test_comparisons_are_in_full_float32_and_leave_the_settings_as_they_were(setting):
    on, seen, model = setting(), [], dense_network()
    spiking = to_spike_driven(model)
    spiking.register_forward_hook(lambda *_: seen.append(setting()))
    compare_counts(model, spiking, IMAGES)
    assert seen[0] in ("ieee", False)
    assert setting() == on
    with pytest.raises(QsdError):
        compare_counts(model, spiking, IMAGES[:, :1])
    assert setting() == on


def test_measuring_auditing_and_calibrating_alone_are_in_full_float32(setting):
    network = nn.Sequential(QuantConv2d(1, 2, 3), SpikeNeuron(2), nn.Flatten(), QuantLinear(8, 3)).eval()
    seen, images, on = [], torch.randn(1, 1, 4, 4), setting()
    spiking = to_spike_driven(network, example=images)
    next(iter(spiking.layers().values())).register_forward_hook(lambda *_: seen.append(setting()))
    for measure in (count_spikes, measure_energy, audit_spike_driven, measure_lost_spikes):
        seen.clear()
        measure(spiking, images)
        assert set(seen) <= {"ieee", False}, measure
        assert seen
        assert setting() == on
    seen.clear()
    calibrate_delays(spiking, images, progress=False)
    assert set(seen) <= {"ieee", False}
    seen.clear()
    spiking(images)
    assert seen == [on], "inference follows PyTorch's setting"


def test_settings_return_when_the_last_of_several_threads_ends(setting):
    on, first, second = setting(), full_float32(), full_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert setting() in ("ieee", False)
    second.__exit__(None, None, None)
    assert setting() == on


def test_a_network_that_tf32_could_change_says_so_once(setting, monkeypatch):
    device, capability = torch.device("cuda"), [8, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    network = nn.Linear(3, 4)  # no convolution, so that one setting matters alone
    assert tf32_note(network, torch.device("cpu")) is None
    assert tf32_note(nn.Linear(3, 4).double(), device) is None
    with full_float32():
        assert tf32_note(network, device) is None
    capability[0] = 7
    assert tf32_note(network, device) is None
    capability[0] = 8
    note = tf32_note(network, device)
    assert "Set torch.backends.cuda.matmul.allow_tf32 = False." in note
    assert "\n" not in note
    assert tf32_note(network, device) is None


def test_a_difference_that_rounding_does_not_explain_is_seen():
    model = dense_network()
    spiking = to_spike_driven(model)
    spiking.neurons()["stem.blocks.0.mlp.neuron1"].drive = lambda x: 4 * x + 0.25
    comparison = compare_counts(model, spiking, IMAGES)
    assert comparison.changed_images == 6
    # neurons up to a quarter of a step below a threshold have tipped over
    assert 0.2 < comparison.farthest_first_difference <= 0.25


class TwoLayers(nn.Module):
    """A neuron behind a constant current, exact without delay, and one behind spikes."""

    def __init__(self):
        super().__init__()
        self.stem, self.neuron = QuantConv2d(3, 8, 4, stride=4), SpikeNeuron(4, 0.3)
        self.conv, self.last = QuantConv2d(8, 8, 3), SpikeNeuron(4, 0.05)
        self.head = QuantLinear(8 * 36, 4, weight_bits=None)
        nn.init.normal_(self.head.weight)

    def forward(self, x):
        return self.head(self.last(self.conv(self.neuron(self.stem(x)))).flatten(1))


def test_a_neuron_on_a_constant_current_is_given_no_delay_and_costs_nothing():
    spiking = to_spike_driven(TwoLayers().double().eval())
    calibration = calibrate_delays(spiking, IMAGES, 0.0, progress=False)
    assert calibration.delays["neuron"] == 0
    assert {cost.logit_error for cost in calibration.costs if cost.neuron == "neuron"} == {0.0}
    assert any(cost.logit_error > 0.01 for cost in calibration.costs if cost.neuron == "last")
    assert not calibration.labelled
    assert calibration.accuracy == calibration.lossless_accuracy == 1.0
    assert (calibration.lossless_latency, calibration.latency) == (4 + 6, 4 + calibration.delays["last"])


def test_the_budget_is_kept_and_a_larger_one_saves_more_steps():
    spiking = to_spike_driven(TwoLayers().double().eval(), example=IMAGES[:1])
    with torch.no_grad():
        labels = spiking(IMAGES).argmax(-1)
    labels[0] = (labels[0] + 1) % 4  # five of six are right
    results = [calibrate_delays(spiking, [(IMAGES, labels)], drop, progress=False) for drop in (0.0, 0.5, 1.0)]
    for drop, result in zip((0.0, 0.5, 1.0), results):
        assert result.labelled
        assert result.lossless_accuracy == pytest.approx(5 / 6)
        assert result.accuracy >= 5 / 6 - drop - 1e-9
        logits = spiking.simulate(IMAGES, result.delays).logits
        assert (logits.argmax(-1) == labels).double().mean() == pytest.approx(result.accuracy)
        assert result.latency == spiking.latency(result.delays)
    assert results[0].latency >= results[1].latency >= results[2].latency
    assert set(results[2].delays.values()) == {0}, "a budget of everything waits nowhere"
    assert len(results[0].costs) == 3 * len(spiking.neurons())
    assert results[0].table().row_count == len(spiking.neurons())
    results[2].apply(spiking)
    assert all(neuron.delay == 0 for neuron in spiking.neurons().values())


def test_a_budget_that_is_no_share_is_refused():
    with pytest.raises(QsdError, match="max_accuracy_drop=2 is no share"):
        calibrate_delays(to_spike_driven(dense_network()), IMAGES, 2)
