"""Models and training loops of one's own: unusual layers, wrappers, batches without images, collapsing steps."""

import copy
import warnings

import pytest
import torch
from torch import nn

from qsd import QsdError, audit_spike_driven, load_weights, measure_energy, model_size, save_packed, to_spike_driven
from qsd.layers import (
    LinearChain,
    NReluSelfAttention,
    QuantConv2d,
    QuantLinear,
    SpikeMaxPool2d,
    TokenMeanLinear,
    conv_norm,
)
from qsd.neurons import LsqNeuron, SpikeNeuron
from qsd.packing import load_packed
from qsd.spiking import compare_counts, count_spikes
from tests.helpers.networks import assert_same_counts, randomize_norms


def network(*layers, channels=8, **conv):
    """An ordinary first layer, a convolution under test between two neurons, and a classifier."""
    tested = QuantConv2d(channels, channels, **{"kernel_size": 3, **conv}) if conv else None
    middle = LinearChain(**{f"layer{i}": layer for i, layer in enumerate((*([tested] if tested else []), *layers))})
    model = nn.Sequential(
        conv_norm(3, channels, 3), SpikeNeuron(3), middle, SpikeNeuron(3), TokenMeanLinear(channels, 4)
    )
    return randomize_steps(randomize_norms_of(model.double())).eval()


def randomize_norms_of(model):
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.3, 1)
    return model


def randomize_steps(model):
    for layer in (m for m in model.modules() if isinstance(m, QuantConv2d)):
        layer.quantizer.step.data.mul_(torch.empty_like(layer.quantizer.step).uniform_(0.7, 1.3))
    return model


PLAIN = {
    "same": {"padding": "same"},
    "same, even kernel": {"kernel_size": 4, "padding": "same"},
    "same, dilated": {"padding": "same", "dilation": (2, 1), "kernel_size": (3, 2)},
    "valid": {"padding": "valid"},
    "rectangular kernel": {"kernel_size": (1, 5), "padding": (0, 2)},
    "rectangular stride": {"stride": (2, 1), "padding": 1},
    "dilation": {"dilation": 2, "padding": (2, 1), "stride": (1, 2)},
    "grouped": {"groups": 4, "kernel_size": (3, 1), "dilation": (2, 1), "padding": (0, 1)},
}


@pytest.mark.parametrize("conv", PLAIN.values(), ids=PLAIN)
def test_unusual_convolutions_convert_and_are_counted(conv):
    norm = nn.BatchNorm2d(8, affine=False)
    model, images = network(norm, **conv), torch.randn(2, 3, 11, 9, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch copies the input where an even kernel keeps the size
        spiking = to_spike_driven(model)
        assert_same_counts(model, spiking, images)
    audit_spike_driven(spiking, images).check()
    layer = next(x for x in measure_energy(spiking, images, progress=False).layers if x.name == "2")
    # Every spike, added once for each output that a kernel of ones connects it with.
    tested = spiking.chains()["2"]
    ones = copy.deepcopy(tested.convolutions["layer0"])
    ones.weight.fill_(1.0)
    ones.bias.zero_()
    spikes = count_spikes(spiking, images)["1"]
    assert layer.additions["merged"] == pytest.approx(float(ones(spikes).sum()) / len(images))


def test_chains_of_unusual_convolutions_merge():
    chain = LinearChain(
        a=QuantConv2d(8, 16, 1, bias=True),
        norm=nn.BatchNorm2d(16, affine=False),
        b=QuantConv2d(16, 16, (3, 2), (2, 1), dilation=(1, 2), groups=4),
        c=QuantConv2d(16, 8, 1, (1, 2)),
    )
    model = nn.Sequential(conv_norm(3, 8, 3), SpikeNeuron(2), chain, SpikeNeuron(2), TokenMeanLinear(8, 3)).double()
    model = randomize_norms_of(model).eval()
    spiking = to_spike_driven(model)
    images = torch.randn(2, 3, 12, 13, dtype=torch.float64)
    assert spiking.chains()["2"].merged is not None
    assert_same_counts(model, spiking, images)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: network(nn.BatchNorm2d(8, track_running_stats=False), padding=1),
            r"layer 2\.layer1 is a batch norm w",
        ),
        (lambda: _with_padding_mode("reflect"), r"layer 2\.layer0 has padding_mode='reflect'"),
        (lambda: _with_padding_mode("circular"), r"layer 2\.layer0 has padding_mode='circular'"),
    ],
)
def test_what_is_no_plain_arithmetic_is_refused_by_name(model, message):
    with pytest.raises(QsdError, match=message):
        to_spike_driven(model())


def _with_padding_mode(mode):
    model = network(padding=1)
    model[2].layer0.padding_mode = mode
    return model


def test_a_neuron_behind_a_neuron_converts():
    model = nn.Sequential(conv_norm(3, 8, 3), SpikeNeuron(4), LsqNeuron(4), conv_norm(8, 4, 3), SpikeNeuron(4)).double()
    model = model.eval()
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    counts = count_spikes(model, images), count_spikes(to_spike_driven(model), images)
    assert all(torch.equal(counts[0][name], counts[1][name]) for name in counts[0])


def _compiled(model):
    return torch.compile(model, backend="eager")


def _compiled_part(model):
    wrapped = copy.deepcopy(model)
    wrapped[2] = torch.compile(wrapped[2], backend="eager")
    return wrapped


@pytest.mark.parametrize("wrap", [_compiled, nn.DataParallel, lambda m: nn.DataParallel(_compiled(m)), _compiled_part])
def test_wrapped_models_are_unwrapped(wrap, tmp_path):
    model = network(padding=1)
    wrapped, images = wrap(model), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    spiking = to_spike_driven(wrapped)
    assert torch.equal(spiking(images), to_spike_driven(model)(images))
    assert count_spikes(wrapped, images).keys() == count_spikes(model, images).keys()
    assert compare_counts(wrapped, spiking, images).equal_counts
    assert model_size(wrapped) == model_size(model)
    save_packed(wrapped, tmp_path / "a.safetensors")
    assert torch.equal(load_packed(tmp_path / "a.safetensors", network(padding=1))(images), model(images))
    if wrap is not _compiled_part:
        load_weights(wrapped, {name: value + 1 for name, value in model.state_dict().items()})
        load_weights(wrapped, {name: value - 1 for name, value in model.state_dict().items()})


def test_distributed_models_are_unwrapped(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network(padding=1))
        assert to_spike_driven(wrapped).neurons().keys() == {"1", "3"}
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("attention", [True, False])
def test_a_batch_of_no_images_gives_an_empty_result_in_every_form(attention):
    model = network(padding=1)
    if attention:
        model = nn.Sequential(
            conv_norm(3, 8, 3), LsqNeuron(2), SpikeMaxPool2d(2), conv_norm(8, 8, 1), NReluSelfAttention(8, 2, 2),
            LsqNeuron(2), TokenMeanLinear(8, 4),
        )  # fmt: skip
        model = randomize_norms(model.double().eval())
    spiking, none = to_spike_driven(model), torch.zeros(0, 3, 8, 8, dtype=torch.float64)
    assert model(none).shape == spiking(none).shape == spiking.evaluate(none).shape == (0, 4)
    trace = spiking.simulate(none, record="1")
    assert trace.logits.shape == (0, 4)
    assert trace.spikes["1"].shape[:2] == (spiking.time_steps, 0)
    assert spiking.stream([none]).logits[0].shape == (0, 4)
    assert spiking.stream([]).logits == []
    for counts in (count_spikes(model, none), count_spikes(spiking, none), trace.counts):
        assert counts.keys() == spiking.neurons().keys()
        assert all(len(count) == 0 for count in counts.values())


def test_unbatched_images_are_refused_in_training_and_evaluation_alike():
    import timm

    model = timm.create_model("qsd_tiny", embed_dims=(8, 8, 8, 8), num_heads=2)
    for training in (True, False):
        with pytest.raises(QsdError, match=r"shape \[3, 32, 32\].*images.unsqueeze\(0\)"):
            model.train(training)(torch.randn(3, 32, 32))
    spiking = to_spike_driven(network(padding=1))
    for run in (spiking, spiking.simulate, lambda x: spiking.stream([x])):
        with pytest.raises(QsdError, match=r"images.unsqueeze\(0\)"):
            run(torch.randn(3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("lean", [True, False])
def test_step_sizes_that_go_through_zero_are_told_once(lean):
    from qsd import set_lean

    model = nn.Sequential(conv_norm(3, 4, 3), LsqNeuron(4), nn.Flatten(), QuantLinear(64, 2))
    set_lean(model, lean)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    images = torch.randn(4, 3, 4, 4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            model(images).square().sum().backward()
            optimizer.step()
        assert not told
        model[1].step.data.fill_(0.1)
        with torch.no_grad():
            model[0].conv.quantizer.step.neg_()
            model[3].quantizer.step.neg_()
        for _ in range(3):
            model(images)
    assert len(told) == 1
    assert "step sizes have to stay positive" in str(told[0].message)


def test_a_delay_for_a_neuron_that_does_not_exist_is_refused_before_a_training():
    from types import SimpleNamespace

    from qsd.callbacks import ConvertToSpikeDriven

    trainer = SimpleNamespace(fast_dev_run=False, enable_validation=True)
    task = nn.ModuleDict({"model": network(padding=1)})
    ConvertToSpikeDriven(delay={"1": 2}).on_fit_start(trainer, task)
    with pytest.raises(QsdError, match="names the neuron 'stem', which does not exist"):
        ConvertToSpikeDriven(delay={"stem": 2}).on_fit_start(trainer, task)
