"""Packed files: the same network from a fraction of the bytes, or one clear line."""

import itertools
import json
import math

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import qsd
from qsd import QsdError, load_packed, model_size, save_packed, to_spike_driven
from qsd.layers import LinearChain, QuantConv2d, QuantLinear, conv_norm, quantized_weight, rep_conv
from qsd.models.packed_file import read_packed, write_packed
from qsd.models.packed_header import PackedHeader
from qsd.neurons import SpikeNeuron
from qsd.packing import read_notes
from tests.helpers.networks import SMALL, randomize_norms, randomize_steps

HEADER = PackedHeader(kind="quantized", model=None, parameters=0, time_steps={}, conversion=None, notes={})


def trained(name="qsd_tiny", **kwargs):
    """A model whose statistics, steps and weights are no round numbers, as after a training."""
    model = randomize_norms(
        timm.create_model(name, **{**SMALL, **kwargs}), mean=(0, 0.3), var=(0.3, 1), bias=(0.2, 0.3)
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.add_(7)
    return randomize_steps(model, 0.5, 1.5).eval()


class Custom(nn.Module):
    """A user's model."""

    def __init__(self, classes=3, bits=4, time_steps=2):
        super().__init__()
        self.stem = conv_norm(3, 6, 3, stride=2, bits=bits)
        self.neuron1 = SpikeNeuron(time_steps)
        self.rep = rep_conv(6, bits)
        self.neuron2 = SpikeNeuron(time_steps, threshold=0.3)
        self.head = QuantLinear(6, classes, weight_bits=bits)
        self.temperature = nn.Buffer(torch.tensor(1.5), persistent=False)

    def forward(self, x):
        x = self.neuron2(self.rep(self.neuron1(self.stem(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def images():
    return torch.randn(2, 3, 40, 33)


def assert_same_state(model, other):
    theirs = other.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_quantized_model_comes_back_with_the_same_logits_bit_for_bit(bits, images, tmp_path):
    model = trained(weight_bits=bits, time_steps=3)
    save_packed(model, tmp_path / "model.safetensors")
    loaded = load_packed(tmp_path / "model.safetensors")
    assert type(loaded) is type(model)
    assert (loaded.num_classes, loaded.time_steps, loaded.weight_bits) == (5, 3, bits)
    assert torch.equal(loaded(images), model(images))
    expected = {**model.state_dict()}
    for name, module in model.named_modules():
        if isinstance(module, QuantConv2d | QuantLinear):
            expected[f"{name}.weight"] = quantized_weight(module)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("arguments", [{"weight_bits": 0}, {"weight_bits": 0, "time_steps": 0}])
def test_float_weights_are_kept_as_they_are(arguments, images, tmp_path):
    model = trained(**arguments)
    save_packed(model, tmp_path / "model.safetensors")
    loaded = load_packed(tmp_path / "model.safetensors")
    assert_same_state(loaded, model)
    assert torch.equal(loaded(images), model(images))


def test_training_goes_on_from_a_packed_model_as_from_the_quantized_weights(images, tmp_path):
    model = trained()
    save_packed(model, tmp_path / "model.safetensors")
    gradients = []
    with torch.no_grad():  # where the model would be if its weights lay on the grid
        for module in model.modules():
            if isinstance(module, QuantConv2d | QuantLinear):
                module.weight.copy_(quantized_weight(module))
    for network in (model, load_packed(tmp_path / "model.safetensors")):
        assert not network.training
        network.train()(images).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert all(bool(torch.isfinite(g).all()) for g in gradients[0])


def test_a_packed_file_starts_a_training_by_init_from_too(images, tmp_path):
    model, other = trained(), trained()
    save_packed(to_spike_driven(model, merged_bits=6), tmp_path / "model.safetensors")
    qsd.load_weights(other, tmp_path / "model.safetensors")
    assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("options", [{}, {"merge": False}, {"merge": "rep", "delay": {"*": 3, "head*": 2}}])
def test_a_spiking_network_is_converted_again_to_the_same_bits(options, images, tmp_path):
    spiking = to_spike_driven(trained(), **options)
    spiking.neurons()["stages.0.blocks.0.mlp.neuron1"].delay = 1  # as a calibration leaves it
    save_packed(spiking, tmp_path / "spiking.safetensors")
    loaded = load_packed(tmp_path / "spiking.safetensors")
    assert_same_state(loaded, spiking)
    assert {n: m.delay for n, m in loaded.neurons().items()} == {n: m.delay for n, m in spiking.neurons().items()}
    assert loaded.latency() == spiking.latency()
    assert torch.equal(loaded.simulate(images).logits, spiking.simulate(images).logits)


def test_loading_again_and_again_changes_nothing(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    save_packed(to_spike_driven(trained(), merged_bits=5), paths[0])
    for path, following in itertools.pairwise(paths):
        save_packed(load_packed(path), following)
    assert paths[0].read_bytes() == paths[1].read_bytes() == paths[2].read_bytes()


def test_weights_that_lie_at_the_middle_of_two_grid_points_convert_as_they_were_trained(images, tmp_path):
    # In float64 weight / step can fall on the other side: the network would no longer be the trained one.
    model = trained()
    layer = model.stages[0].downsample.proj.conv
    with torch.no_grad():
        step = layer.quantizer.step.view(-1, 1, 1, 1)
        halves = torch.randint(-7, 7, layer.weight.shape) + 0.5
        layer.weight.copy_(torch.nextafter(halves * step, torch.tensor(math.inf)))
    in_float32 = layer.quantizer.integers(layer.weight)
    in_float64 = (layer.weight.double() / step.double()).round().clamp(-8, 7)
    assert not torch.equal(in_float32, in_float64.to(torch.int8)), "this test would prove nothing"
    spiking = to_spike_driven(model)
    torch.testing.assert_close(spiking(images), model(images), rtol=1e-3, atol=1e-3)
    assert torch.equal(spiking.trained.tensors["stages.0.downsample.proj.conv.weight"], in_float32)


def test_the_type_of_a_converted_network_is_kept(tmp_path, images):
    spiking = to_spike_driven(trained()).double()
    save_packed(spiking, tmp_path / "spiking.safetensors")
    loaded = load_packed(tmp_path / "spiking.safetensors")
    assert_same_state(loaded, spiking)
    assert loaded(images.double()).dtype == torch.float64


def test_merged_integers_are_in_the_file_and_are_what_the_network_computes_with(tmp_path, images):
    spiking = to_spike_driven(trained(), merged_bits=5)
    path = tmp_path / "spiking.safetensors"
    save_packed(spiking, path)
    header, tensors = read_packed(path)
    merged = [name for name in tensors if name.startswith("merged/") and name.endswith("weight")]
    assert len(merged) == 4 + 4 * 4  # a SepConv per convolutional block, four projections per attention
    for name in merged:
        assert header.packed[name].bits == 5
        assert int(tensors[name].abs().max()) == 15
        kernel = spiking.chains()[name.removeprefix("merged/").removesuffix(".weight")].merged
        scale = tensors[name.replace("weight", "scale")].view(-1, 1, 1, 1)
        assert torch.equal(kernel.weight, tensors[name] * scale)
    loaded = load_packed(path)
    assert_same_state(loaded, spiking)
    assert torch.equal(loaded(images), spiking(images))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 16))
def test_integers_of_any_width_survive_in_their_width(data, bits):
    shape = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = data.draw(st.lists(st.integers(low, high), min_size=math.prod(shape), max_size=math.prod(shape)))
    integers = torch.tensor(values, dtype=torch.int16).reshape(shape)
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        write_packed(path, HEADER, {}, {"x": (integers, bits)})
        header, tensors = read_packed(path)
        with safe_open(path, "pt") as file:
            stored = file.get_tensor("x").numel()
    assert torch.equal(tensors["x"].to(torch.int16), integers)
    assert header.packed["x"].bits == bits
    assert stored <= math.ceil(integers.numel() * bits / 8)
    assert tensors["x"].dtype == (torch.int8 if bits <= 8 else torch.int16)


@pytest.mark.parametrize(("name", "limit"), [("qsd_15m", 8.3e6), ("qsd_55m", 29.5e6)])
def test_published_sizes_on_disk(name, limit, tmp_path):
    with torch.device("meta"):
        model = timm.create_model(name)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():  # incompressible floats, weights as a trained layer has them
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
            else:
                tensor.fill_(1000)
            if key.endswith(("step", "running_var")):
                tensor.abs_().mul_(0).add_(
                    0.34
                )  # LSQ's optimum for 4-bit normal weights: the widest spread of integers
    path = tmp_path / "model.safetensors"
    save_packed(model, path)
    assert path.stat().st_size <= limit
    size = model_size(model)
    assert size.float_equivalents == pytest.approx(size.parameters * 4 / 32)
    assert {"qsd_15m": 15.117e6, "qsd_55m": 55.359e6}[name] == pytest.approx(size.parameters, rel=1e-3)
    assert path.stat().st_size < size.packed_bytes * 1.02
    assert 6.8 < size.float_bytes / size.packed_bytes < 8  # 8 but for norms and steps


def test_sizes_of_a_network_that_can_be_counted_by_hand():
    chain = LinearChain(conv=QuantConv2d(3, 4, 1, weight_bits=3), norm=nn.BatchNorm2d(4))
    model = nn.Sequential(chain, SpikeNeuron(2), rep_conv(4, weight_bits=3), SpikeNeuron(2), nn.Flatten())
    size = model_size(model)
    weights = 12 + 16 + 4 * 9 + 16
    norms = 4
    assert size.parameters == weights + norms * 2 * 4
    assert size.float_bytes == 4 * (weights + norms * 4 * 4)
    assert size.packed_bytes == math.ceil(weights * 3 / 8) + 4 * (4 * 4) + norms * (4 * 4 * 4 + 8)
    assert size.converted_bytes is None
    assert size.float_equivalents == size.parameters * 3 / 32
    example = torch.zeros(1, 3, 5, 5)
    unmerged, merged, rounded = (
        model_size(to_spike_driven(model, example=example, **options)).converted_bytes
        for options in ({"merge": False}, {}, {"merged_bits": 6})
    )
    first = 12 * 3 / 8 + 4 * 2 * 4
    assert unmerged == math.ceil(first + (16 + 36 + 16) * 3 / 8 + 4 * (3 * 2 + 1) * 4)  # one factor has a frame
    assert merged == math.ceil(first + 4 * 4 * 9 * 4 + 4 * 2 * 4)
    assert rounded == math.ceil(first + 4 * 4 * 9 * 6 / 8 + 4 * 2 * 4)


def test_arguments_a_changed_classifier_and_a_pruned_network(tmp_path, images):
    path = tmp_path / "model.safetensors"
    model = trained(in_chans=1, strides=(1, 1, 2, 2, 1))
    model.reset_classifier(9)
    save_packed(model, path)
    assert load_packed(path)(images[:, :1]).shape == (2, 9)
    model = trained()
    model.prune_intermediate_layers([1])  # no name and argument builds this
    save_packed(model, path)
    with pytest.raises(QsdError, match="a model of your own"):
        load_packed(path)
    skeleton = timm.create_model("qsd_tiny", **SMALL)
    skeleton.prune_intermediate_layers([1])
    assert torch.equal(load_packed(path, skeleton).forward_features(images), model.forward_features(images))
    pyramid = timm.create_model("qsd_tiny", **SMALL, features_only=True, out_indices=(1, 3)).eval()
    save_packed(pyramid, path)
    assert all(torch.equal(a, b) for a, b in zip(load_packed(path)(images), pyramid(images)))


def test_a_model_of_ones_own_needs_a_skeleton_that_fits(tmp_path, images):
    path, model = tmp_path / "own.safetensors", Custom().eval()
    save_packed(to_spike_driven(model), path)
    loaded = load_packed(path, Custom())
    torch.testing.assert_close(loaded(images), model(images))
    with pytest.raises(QsdError, match="a model of your own, which timm cannot build: pass one"):
        load_packed(path)
    for skeleton, message in (
        (Custom(classes=4), r"head.*\(3,\) instead of \(4,\)"),
        (Custom(bits=3), "weight bits of head.weight are 4 in the file, 3 in the model"),
        (Custom(time_steps=4), "time steps of neuron1 are 2 in the file, 4 in the model"),
        (Custom(bits=None), "unexpected: head.quantizer.step"),
        (nn.Linear(2, 2), "does not fit the model"),
    ):
        before = {name: tensor.clone() for name, tensor in skeleton.state_dict().items()}
        with pytest.raises(QsdError, match=message):
            load_packed(path, skeleton)
        assert all(torch.equal(tensor, before[name]) for name, tensor in skeleton.state_dict().items())


def test_other_parameters_and_buffers_of_any_type_are_kept(tmp_path):
    class Learned(SpikeNeuron):
        def __init__(self):
            super().__init__(2)
            self.step = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
            self.seen = nn.Buffer(torch.tensor([True, False]))

    model = nn.Sequential(QuantConv2d(3, 4, 3), Learned())
    model[0].bfloat16()
    save_packed(model, tmp_path / "model.safetensors")
    loaded = load_packed(tmp_path / "model.safetensors", nn.Sequential(QuantConv2d(3, 4, 3), Learned()))
    assert loaded[0].weight.dtype == torch.bfloat16
    assert torch.equal(loaded[0].weight, quantized_weight(model[0]))
    assert torch.equal(loaded[1].step, model[1].step)
    assert loaded[1].step.requires_grad
    assert torch.equal(loaded[1].seen, model[1].seen)


def test_a_compiled_model_is_packed_as_what_it_compiles(tmp_path, images):
    model = trained()
    save_packed(torch.compile(model, backend="eager"), tmp_path / "model.safetensors")
    assert torch.equal(load_packed(tmp_path / "model.safetensors")(images), model(images))


def test_notes_are_kept(tmp_path):
    path = tmp_path / "model.safetensors"
    save_packed(trained(), path, notes={"class_names": ["ein", "zwei"]})
    assert read_notes(path) == {"class_names": ["ein", "zwei"]}
    with pytest.raises(QsdError, match="no JSON"):
        save_packed(trained(), path, notes={"class_names": {1, 2}})
    assert read_notes(path) == {"class_names": ["ein", "zwei"]}


@pytest.mark.parametrize("where", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_says_so(where, tmp_path):
    path = tmp_path / "model.safetensors"
    save_packed(trained(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * where)])
    with pytest.raises(QsdError, match=r"model.safetensors cannot be read: it is damaged"):
        load_packed(path)


def rewrite(path, key="qsd", tensors=None, **header):
    """The same file with other tensors or entries of its header."""
    with safe_open(path, "pt") as file:
        before, content = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = json.dumps({**json.loads(before["qsd"]), **header})
    safetensors.torch.save_file({**content, **(tensors or {})}, path, {key: text})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "format"}, "was not written by qsd.save_packed"),
        ({"version": 2}, "has version 2 of the format; this qsd reads 1"),
        ({"tensors": {"head.quantizer.step": torch.zeros(5)}}, "step sizes that are not positive: head.quantizer.step"),
        ({"tensors": {"head.weight": torch.zeros(3, dtype=torch.uint8)}}, "cannot be read: it is damaged"),
        ({"tensors": {"head.bias": torch.full((5,), math.nan)}}, "weights that are not finite: head.bias"),
        ({"model": {"name": "qsd_999m", "arguments": {}}}, "model 'qsd_999m' is not registered"),
        ({"model": {"name": "qsd_tiny", "arguments": {"x": 1}}}, "does not take its stored arguments"),
        ({"model": {"name": "qsd_tiny", "arguments": {}}}, "does not fit the model"),
    ],
)
def test_a_file_that_is_something_else(changes, message, tmp_path):
    path = tmp_path / "model.safetensors"
    save_packed(trained(), path)
    rewrite(path, **changes)
    with pytest.raises(QsdError, match=message):
        load_packed(path)


def test_mistakes_in_saving_leave_what_was_there(tmp_path, monkeypatch):
    path, model = tmp_path / "model.safetensors", trained()
    save_packed(model, path)
    before = path.read_bytes()
    with torch.no_grad():
        model.head.quantizer.step[1] = 0
    with pytest.raises(QsdError, match=r"step sizes that are not positive: head\.quantizer\.step"):
        save_packed(model, path)
    with pytest.raises(QsdError, match=r"folder .*missing does not exist"):
        save_packed(trained(), tmp_path / "missing" / "model.safetensors")
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(QsdError, match="cannot be written: disk is full"):
        save_packed(trained(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(QsdError, match=r"does not exist|is no file"):
            load_packed(missing)
