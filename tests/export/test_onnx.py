"""ONNX files with floats give the logits of the count domain, and files with integers give its spike counts."""

import json

import numpy as np
import pytest
import torch

import qsd
from qsd.export import to_onnx
from qsd.export.four_bits import FourBits
from qsd.export.grids import calibrate
from qsd.export.requantization import Requantization
from qsd.export.words import Dictionary
from qsd.integer.weights import IntegerWeights
from tests.helpers import sample
from tests.helpers.exporting import CSD, ESF, QSD, run_onnx, spiking_network

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def operations(path):
    return [node.op_type for node in onnx.load(path).graph.node]


EXACT = [
    (CSD, {}, {}),  # No chains, so that nothing is rounded.
    (QSD, {}, {"round_inner": "none"}),
    ((ESF[0], {**ESF[1], "rounding": "half_even"}), {}, {"standard": True}),  # No chains, and many ties.
    (QSD, {"merged_bits": 8}, {}),  # No inner values.
    (ESF, {}, {}),
]


@pytest.mark.parametrize(("network", "conversion", "export"), sample(EXACT[:3], EXACT))
def test_without_inner_rounding_an_integer_file_has_the_same_counts(network, conversion, export, tmp_path):
    spiking, images = spiking_network(*network, **conversion)
    to_onnx(spiking, tmp_path / "int.onnx", True, images, **export)
    logits, counts = run_onnx(tmp_path / "int.onnx", images)
    expected = qsd.count_spikes(spiking, images)
    assert counts.keys() == expected.keys()
    for name, count in expected.items():
        np.testing.assert_array_equal(counts[name], count.numpy(), err_msg=name)
    torch.testing.assert_close(torch.from_numpy(logits), spiking(images), rtol=1e-4, atol=1e-5)
    assert operations(tmp_path / "int.onnx").count("Conv") <= 1 + 2 * 16  # The stem, and unrounded chains.
    domains = {node.domain for node in onnx.load(tmp_path / "int.onnx").graph.node}
    assert domains == ({""} if export.get("standard") else {"", "com.microsoft"})


def test_inner_rounding_is_at_most_half_a_level(tmp_path):
    spiking, images = spiking_network(*QSD)
    to_onnx(spiking, tmp_path / "int.onnx", True, images)
    check_versions_and_widths(tmp_path / "int.onnx")
    assert operations(tmp_path / "int.onnx").count("Conv") == 1  # The stem, on the image.
    assert operations(tmp_path / "int.onnx").count("QLinearConv") > 10
    name = "stem.blocks.0.sep_conv.reduce"  # The first chain, whose input is exact.
    model = onnx.load(tmp_path / "int.onnx")
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(f"{name}.depthwise.output", onnx.TensorProto.UINT8, None)
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    levels = torch.from_numpy(session.run(None, {"images": images.numpy()})[-1])
    exact = []
    spiking.chains()[name].factors["depthwise"].register_forward_hook(lambda _m, _i, output: exact.append(output))
    grid = calibrate(spiking, images)[f"{name}.depthwise"]
    seen = exact[0].amax((0, 2, 3)).clamp(min=0) - exact[0].amin((0, 2, 3)).clamp(max=0)
    assert (grid.unit * 255 > 0.999 * seen.numpy()).all()  # The grid holds the range,
    assert (grid.unit.max() * 255 < 2 * seen.max()).all()  # and little more.
    units = torch.from_numpy(grid.unit).view(-1, 1, 1)
    error = (levels.double() - grid.zero_point) * units - exact[0]
    assert float((error.abs() / units).max()) <= 0.5 + 1e-3  # The file computes in float32.


def test_an_integer_file_can_end_in_a_convolution_and_be_compact(tmp_path):
    spiking, images = spiking_network(*CSD, part="stem")
    to_onnx(spiking, tmp_path / "int.onnx", True, images, compact=True)
    currents, counts = run_onnx(tmp_path / "int.onnx", images)
    for name, count in qsd.count_spikes(spiking, images).items():
        np.testing.assert_array_equal(counts[name], count.numpy(), err_msg=name)
    torch.testing.assert_close(torch.from_numpy(currents), spiking(images), rtol=1e-4, atol=1e-4)
    model, types = onnx.load(tmp_path / "int.onnx"), onnx.TensorProto
    onnx.checker.check_model(model)
    assert (model.ir_version, {entry.domain: entry.version for entry in model.opset_import}[""]) == (8, 18)
    assert not [tensor.name for tensor in model.graph.initializer if tensor.data_type == types.INT4]
    assert "Compress" in operations(tmp_path / "int.onnx")
    # ONNX Runtime has nothing left to unpack when it runs.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "int.onnx", options, providers=["CPUExecutionProvider"])
    assert not {"Compress", "Split"} & {*operations(tmp_path / "optimized.onnx")}


def test_the_float_file_takes_any_number_of_images_and_gives_the_same_logits(tmp_path):
    spiking, images = spiking_network(*QSD)
    to_onnx(spiking, tmp_path / "float.onnx", notes={"class_names": ["a"]})
    session = onnxruntime.InferenceSession(tmp_path / "float.onnx", providers=["CPUExecutionProvider"])
    for size in (1, 3, 16):
        logits = session.run(None, {"images": images[:size].numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(logits), spiking(images[:size]), rtol=1e-4, atol=1e-4)
    assert session.run(None, {"images": images[:0].numpy()})[0].shape == (0, 10)
    check_that_it_takes_no_other_size(session)
    header = json.loads(session.get_modelmeta().custom_metadata_map["qsd"])
    assert header["notes"] == {"class_names": ["a"]}
    assert header["image"] == [3, 32, 32]


def check_versions_and_widths(path):
    """The versions are those that the documentation names, and all large weights of 4 bits take 4 bits."""
    model = onnx.load(path)
    assert (model.ir_version, {entry.domain: entry.version for entry in model.opset_import}[""]) == (10, 21)
    types, weights = onnx.TensorProto, model.graph.initializer
    assert len([tensor for tensor in weights if tensor.data_type == types.INT4]) > 20
    wide = [tensor for tensor in weights if tensor.data_type == types.INT8 and np.prod(tensor.dims) >= 64]
    assert all(".weight.factor" in tensor.name and np.prod(tensor.dims) == max(tensor.dims) for tensor in wide)
    assert not [node.output for node in model.graph.node if node.metadata_props or node.name]
    small = [(tensor.data_type, tuple(tensor.dims), tensor.raw_data) for tensor in weights if np.prod(tensor.dims) == 1]
    assert len(small) - len({*small}) <= len([name for name in operations(path) if name in ("Clip", "QuantizeLinear")])


def test_four_bits_and_powers_of_two_are_the_weights():
    generator = np.random.default_rng(0)
    base = generator.integers(-8, 8, (12, 9, 3))
    rows, columns = 2 ** generator.integers(0, 4, (12, 1, 1)), 2 ** generator.integers(0, 3, (1, 9, 1))
    signs = np.where(np.arange(12) % 3 == 0, -1, 1)[:, None, None]  # -8 turned around needs a factor.
    turned = FourBits.of((base * signs)[:, :, 0].T)  # Output channels may be the second axis, too.
    assert turned is not None
    small = FourBits.of(base * rows * columns * signs)
    assert small is not None
    product = small.integers
    for factor in small.factors:
        assert (np.abs(factor) & (np.abs(factor) - 1) == 0).all()
        product = product * factor
    np.testing.assert_array_equal(product, base * rows * columns * signs)
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=base.shape, raw_data=small.packed())
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(int), small.integers)
    assert len(small.packed()) == base.size // 2
    assert FourBits.of(np.arange(-20, 20).reshape(8, 5).repeat(2, 0)) is None


@pytest.mark.parametrize("levels", [(-2, 2), (-8, 8), (3, 4)])
def test_words_of_a_dictionary_are_the_weights_in_about_their_entropy(levels):
    weights = np.random.default_rng(0).normal(0, 1.7, 20000).round().astype(int).clip(levels[0], levels[1] - 1)
    dictionary = Dictionary.of(weights)
    words, (entries, used) = dictionary.encode(weights), dictionary.tables()
    np.testing.assert_array_equal(entries[words][used[words]], weights)
    shares = np.unique(weights, return_counts=True)[1] / len(weights)
    assert entries.shape == used.shape
    assert len(entries) <= 256
    assert 8 * len(words) / len(weights) < max(1.15 * -(shares * np.log2(shares)).sum(), 8 / 5 + 0.01)


@pytest.mark.parametrize("time_steps", [1, 3, 4, 8])
def test_integer_requantization_gives_the_neurons_count_for_every_sum(time_steps):
    generator = np.random.RandomState(time_steps)
    weights = IntegerWeights(
        generator.randint(-8, 8, (40, 6)).astype(float), generator.uniform(0.01, 0.1, 40), generator.normal(0, 0.3, 40)
    )
    threshold = 1 / time_steps
    numbers = Requantization.counting(weights, threshold, time_steps)
    assert numbers is not None
    finer = weights.finer(time_steps)
    for channel in range(40):
        rows = weights.integers[channel]
        sums = np.arange(time_steps * rows.clip(max=0).sum(), time_steps * rows.clip(min=0).sum() + 1)
        drive = (sums * weights.scale[channel] + weights.bias[channel]) / threshold
        expected = np.floor(drive + 0.5).clip(0, time_steps)
        total = (sums * finer[channel] + numbers.bias[channel]).astype(np.float32)
        np.testing.assert_array_equal(np.rint(total * numbers.multiplier[channel]).clip(0, time_steps), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"integer": True}, "needs images"),
        ({"notes": {"a": object()}}, "is no JSON"),
        ({"round_inner": "some"}, "round_inner='some' is unknown"),
        ({"path": "nowhere/a.onnx"}, "does not exist; make it first"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spiking, _ = spiking_network(*QSD)
    with pytest.raises(qsd.QsdError, match=message):
        to_onnx(spiking, **{"path": "a.onnx", **options})
    assert not list(tmp_path.iterdir())


def test_early_neurons_and_float_weights_are_refused(tmp_path):
    spiking, images = spiking_network(*QSD, delay=1)
    with pytest.raises(qsd.QsdError, match="fires before its input is complete"):
        to_onnx(spiking, tmp_path / "a.onnx")
    spiking, images = spiking_network(CSD[0], {**CSD[1], "weight_bits": 0})
    with pytest.raises(qsd.QsdError, match="has float weights"):
        to_onnx(spiking, tmp_path / "a.onnx", True, images)


def test_a_file_takes_no_other_image_size_because_its_thresholds_hold_the_number_of_tokens(tmp_path):
    spiking, images = spiking_network(*CSD)
    to_onnx(spiking, tmp_path / "a.onnx", True, images)  # A file with floats: in the test of its logits.
    check_that_it_takes_no_other_size(
        onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    )


def check_that_it_takes_no_other_size(session):
    assert session.get_inputs()[0].shape[1:] == [3, 32, 32]
    with pytest.raises(Exception, match="Got invalid dimensions for input: images"):
        session.run(None, {"images": np.zeros((1, 3, 48, 48), np.float32)})
