"""Layers defined outside of the package: with writers of their own they are exported, without them they are refused."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qsd
from qsd.export import Signal, to_nir, to_onnx, writes, writes_nir
from qsd.layers import QuantConv2d, QuantLinear
from qsd.neurons import build_neuron
from qsd.spiking import register_conversion
from qsd.spiking.layers import SpikingLinear
from tests.helpers.exporting import run_onnx
from tests.helpers.nir_interpreter import simulate

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Blur(nn.Module):
    """A depthwise convolution with a fixed binomial kernel."""

    def forward(self, x):
        return F.conv2d(x, kernel(x), padding=1, groups=x.shape[1])


def kernel(x):
    row = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype) / 4
    return (row[:, None] * row).expand(x.shape[1], 1, 3, 3)


class SpikingBlur(SpikingLinear):
    """Its counterpart on spikes."""

    def __init__(self, name, runtime):
        super().__init__(name, runtime)
        self.amplitude = 1.0

    def linear_map(self, x, share):
        return Blur()(x) * self.amplitude

    def absorb(self, amplitude):
        self.amplitude = amplitude

    def operations(self, inputs):
        return None

    def stored_bits(self, weight_bits, merged_bits):
        return 0.0


@register_conversion(Blur)
def _convert(module, name, conversion):
    return SpikingBlur(name, conversion.runtime)


@writes(SpikingBlur)
def _write(layer, call, graph):
    spikes = graph.floats(call.inputs[0], f"{layer.name}.counts")
    weight = graph.constant(f"{layer.name}.kernel", kernel(torch.ones(1, 8)) * layer.amplitude, np.float32)
    graph.add("Conv", [spikes, weight], call.output, pads=[1] * 4, group=8)


@writes_nir(SpikingBlur)
def _write_nir(layer, call, graph):
    x = graph.signal(call.inputs[0])
    channels, *size = x.constant.shape
    dense = torch.eye(channels)[:, :, None, None] * kernel(x.constant[None]) * layer.amplitude
    convolution = graph.nir.Conv2d(tuple(size), dense.numpy(), 1, 1, 1, 1, np.zeros(channels, np.float32))
    nodes = graph.add(layer.name, convolution, *x.nodes)
    return Signal(nodes, torch.zeros_like(x.constant), x.bound * layer.amplitude, x.arrival)


class Small(nn.Sequential):
    """A user's classifier around a layer."""

    def __init__(self, layer):
        super().__init__(
            QuantConv2d(3, 8, 3, stride=2, padding=1, weight_bits=4),
            build_neuron(4),
            layer,
            build_neuron(4, 0.23),  # No sum of blurred spikes is a tie.
            QuantConv2d(8, 8, 3, padding=1, weight_bits=4),
            Mean(),
            build_neuron(4),
            QuantLinear(8, 5, weight_bits=4),
        )


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


@register_conversion(Mean)
def _mean(module, name, conversion):
    return module


def blurred():
    torch.manual_seed(0)
    images = torch.rand(6, 3, 16, 12) * 4
    return qsd.to_spike_driven(Small(Blur()).eval(), example=images[:1]), images


def test_a_layer_with_a_rule_and_a_writer_gives_the_same_counts_from_an_integer_file(tmp_path):
    spiking, images = blurred()
    to_onnx(spiking, tmp_path / "int.onnx", True, images)
    logits, counts = run_onnx(tmp_path / "int.onnx", images)
    expected = qsd.count_spikes(spiking, images)
    assert counts.keys() == expected.keys()
    for name, count in expected.items():
        assert 0 < count.float().mean() < 4, name
        np.testing.assert_array_equal(counts[name], count.numpy(), err_msg=name)
    torch.testing.assert_close(torch.from_numpy(logits), spiking(images), rtol=1e-4, atol=1e-5)


def test_a_layer_with_a_rule_and_a_writer_fires_the_same_spikes_in_a_nir_graph(tmp_path):
    spiking, images = blurred()
    spiking, images = spiking.double(), images.double()
    to_nir(spiking, tmp_path / "a.nir")
    logits, counts = simulate(tmp_path / "a.nir", images)
    for name, count in qsd.count_spikes(spiking, images).items():
        assert float((counts[name] != count).double().mean()) < 1e-3, name  # The file holds float32.
    torch.testing.assert_close(logits, spiking(images), rtol=1e-3, atol=1e-3)


class Unwritten(Blur):
    pass


class SpikingUnwritten(SpikingBlur):
    """A subclass of a layer that has a writer: it may compute something else."""


@register_conversion(Unwritten)
def _convert_unwritten(module, name, conversion):
    return SpikingUnwritten(name, conversion.runtime)


def test_a_layer_without_a_writer_is_refused_by_its_name_and_the_decorator(tmp_path):
    images = torch.rand(1, 3, 16, 12)
    spiking = qsd.to_spike_driven(Small(Unwritten()).eval(), example=images)
    with pytest.raises(
        qsd.QsdError, match=r"^layer 2 \(SpikingUnwritten\) has no writer .*@qsd\.export\.writes\("
    ) as error:
        to_onnx(spiking, tmp_path / "a.onnx", True, images)
    assert "\n" not in str(error.value)
    with pytest.raises(
        qsd.QsdError, match=r"^layer 2 \(SpikingUnwritten\) .*@qsd\.export\.writes_nir\(SpikingUnwritten\)"
    ):
        to_nir(spiking, tmp_path / "a.nir")
    assert not list(tmp_path.iterdir())


def test_a_layer_without_a_writer_is_no_obstacle_for_a_file_with_floats(tmp_path):
    images = torch.rand(4, 3, 16, 12) * 4
    spiking = qsd.to_spike_driven(Small(Unwritten()).eval(), example=images[:1])
    to_onnx(spiking, tmp_path / "float.onnx", images=images)
    logits, _ = run_onnx(tmp_path / "float.onnx", images)
    torch.testing.assert_close(torch.from_numpy(logits), spiking(images), rtol=1e-4, atol=1e-4)


class Twice(nn.Module):
    """A network that runs one neuron on two layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (QuantConv2d(c, 4, 3, padding=1, weight_bits=4) for c in (3, 4))
        self.fire = build_neuron(4)
        self.conv3 = QuantConv2d(4, 5, 1, weight_bits=4)

    def forward(self, x):
        return self.conv3(self.fire(self.conv2(self.fire(self.conv1(x)))))


def test_a_layer_that_runs_twice_is_refused_by_its_name(tmp_path):
    spiking = qsd.to_spike_driven(Twice().eval(), example=torch.rand(1, 3, 8, 8))
    with pytest.raises(qsd.QsdError, match=r"^layer fire runs several times in a pass"):
        to_onnx(spiking, tmp_path / "a.onnx", True, torch.rand(2, 3, 8, 8))
    assert not list(tmp_path.iterdir())
