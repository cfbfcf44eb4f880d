"""Recorded runs of converted networks: replayed where they are the same, ordinary runs elsewhere."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from qsd import count_spikes, measure_energy, to_spike_driven
from qsd.layers import QuantConv2d, TokenMeanLinear
from qsd.neurons import SpikeNeuron
from qsd.spiking import graphs
from tests.helpers import long

IMAGES = torch.randn(2, 1, 6, 6)
SIZES = {
    "qsd_tiny": {"embed_dims": (8, 8, 16, 16), "num_heads": 2, "depth": 4, "layer_scale": 0.5, "num_classes": 5},
    "csdformer_4_256": {"embed_dims": 16, "num_heads": 2, "depth": 1, "num_classes": 5},
}


@pytest.fixture
def spiking():
    network = nn.Sequential(QuantConv2d(1, 3, 3), SpikeNeuron(2), QuantConv2d(3, 4, 3), SpikeNeuron(2))
    return to_spike_driven(network.append(TokenMeanLinear(4, 3)).eval(), example=IMAGES[:1])


@pytest.fixture
def replays(monkeypatch):
    """What is replayed, with a recording that stands for a compiled program or a CUDA graph."""
    seen = []

    def record(function, _images, _compile):
        return lambda images: seen.append(tuple(images.shape)) or function(images)

    monkeypatch.setattr(graphs, "recorded", record)
    return seen


def test_runs_of_a_recorded_kind_are_replayed_and_all_others_are_ordinary(spiking, replays):
    expected, stepped = spiking(IMAGES), spiking.simulate(IMAGES)
    with spiking.graphs.recording(compile=True):
        spiking(IMAGES)
        spiking.simulate(IMAGES)
    replays.clear()
    assert torch.equal(spiking(IMAGES), expected)
    trace = spiking.simulate(IMAGES)
    assert torch.equal(trace.logits, stepped.logits)
    assert all(torch.equal(counts, stepped.counts[name]) for name, counts in trace.counts.items())
    assert list(trace.counts) == list(stepped.counts)
    assert len(replays) == 2
    replays.clear()
    spiking(IMAGES[:1])  # another shape
    spiking.simulate(IMAGES, record="1")
    spiking.simulate(IMAGES, delay=0)
    count_spikes(spiking, IMAGES)
    measure_energy(spiking, IMAGES, progress=False)
    handle = spiking.neurons()["1"].register_forward_hook(lambda *_: None)
    spiking(IMAGES)
    handle.remove()
    for other in (copy.deepcopy(spiking), pickle.loads(pickle.dumps(spiking))):
        other(IMAGES)
    assert not replays
    spiking(IMAGES)
    assert replays == [tuple(IMAGES.shape)]
    spiking.double()  # replaces the tensors that were recorded
    spiking.float()(IMAGES)
    assert len(replays) == 1


def test_a_program_of_torch_operations_has_the_same_bits_and_sees_new_images(spiking, monkeypatch):
    programs = []
    monkeypatch.setattr(torch, "compile", lambda program, **_: programs.append(program) or program)
    others = torch.randn_like(IMAGES)
    expected = spiking(IMAGES), spiking(others)
    with spiking.graphs.recording(compile=True):
        spiking(IMAGES)
        spiking.simulate(IMAGES)  # whose tensors cannot be traced
    assert len(programs) == 1
    assert torch.equal(spiking(IMAGES), expected[0])
    assert torch.equal(spiking(others), expected[1])


def test_passes_run_without_a_graph_that_cannot_be_recorded_and_the_reason_is_told_once(spiking, monkeypatch):
    class OnDevice(torch.Tensor):
        is_cuda = True

    def fail(function, images):
        function(images)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr(graphs, "cuda_graph", fail)
    expected, stepped, images = spiking(IMAGES), spiking.simulate(IMAGES).logits, IMAGES.as_subclass(OnDevice)
    for run, result in ((spiking, expected), (lambda images: spiking.simulate(images).logits, stepped)):
        with (
            spiking.graphs.recording(),
            pytest.warns(UserWarning, match=r"^No CUDA graph was recorded: CUDA out of memory\. These passes") as told,
        ):
            outputs = [run(images) for _ in range(3)]
        assert len(told) == 1
        assert all(torch.equal(output, result) for output in outputs)
    assert torch.equal(spiking(images), expected)


def test_an_error_of_a_pass_is_raised_by_the_pass_without_a_graph(monkeypatch):
    def broken(images):
        raise RuntimeError("The images do not fit.")

    monkeypatch.setattr(graphs, "cuda_graph", lambda function, images: function(images))
    with pytest.warns(UserWarning, match="recorded: The images do not fit. These"):
        program = graphs.recorded(broken, SimpleNamespace(is_cuda=True), False)
    with pytest.raises(RuntimeError, match=r"The images do not fit\."):
        program(IMAGES)


@long
@pytest.mark.parametrize("name", SIZES)
def test_compiled_passes_have_the_results_of_ordinary_ones(name):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = timm.create_model(name, **SIZES[name]).double().train()
    model(images)
    spiking = to_spike_driven(model.eval())
    with spiking.graphs.recording(compile=True):
        spiking(images)
    torch.testing.assert_close(spiking(images), copy.deepcopy(spiking)(images), rtol=1e-10, atol=1e-12)
