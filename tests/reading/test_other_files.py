"""safetensors and ONNX files, and configurations as literals."""

import json
import os

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qsd import QsdError
from qsd.models.checkpoints import read_checkpoint
from qsd.reading import FileError, check_safetensors, parse_assignments, read_onnx, read_safetensors
from tests.helpers import sample
from tests.helpers.files import only_opens, works_or_one_line

FUZZ = settings(max_examples=sample(25, 500), deadline=None, suppress_health_check=list(HealthCheck))


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), span=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def test_tensors_and_metadata_are_read(tmp_path):
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.zeros(0, dtype=torch.int8),
        "c": torch.ones((), dtype=torch.bfloat16),
    }
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"key": "text"})
    with only_opens(tmp_path / "a.safetensors"):
        metadata, read = read_safetensors(tmp_path / "a.safetensors")
    assert metadata == {"key": "text"}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"text\n" * 30, "a text file"),
        (b"\x00" * 30, "no safetensors file"),
        (b"\x80\x02}q\x00.", "a pickle"),
        ((10**12).to_bytes(8, "little") + b"{}", "no safetensors file"),
        ((2).to_bytes(8, "little") + b"{", "no safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "no safetensors file"),
        ((3).to_bytes(8, "little") + b"{x}", "its header is no JSON"),
    ],
)
def test_files_that_are_none_are_named(tmp_path, content, message):
    (tmp_path / "a.safetensors").write_bytes(content)
    for read in (read_safetensors, read_checkpoint):
        with pytest.raises(FileError, match=message):
            read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(shape=[10**12])}, "shape that does not fit"),
        ({"a": entry(shape=[2**62, 4])}, "shape that does not fit"),
        ({"a": entry(shape=[-2])}, "shape that does not fit"),
        ({"a": entry(shape=[True, 2])}, "shape that does not fit"),
        ({"a": entry(span=(0, 4))}, "shape that does not fit"),
        ({"a": entry(span=(4, 12))}, "gaps or overlap"),
        ({"a": entry(), "b": entry()}, "gaps or overlap"),
        ({"a": entry(), "b": entry(span=(8, 16))}, "8 bytes of tensors where its header tells 16"),
        ({"a": entry(dtype="Q9")}, "'a' lacks a known dtype"),
        ({"a": {"dtype": "F32"}}, "'a' lacks a known dtype"),
        ({"a": 3}, "'a' lacks a known dtype"),
        ({"a": entry(), "__metadata__": {"k": 1}}, "metadata are no texts"),
        ({"a": entry(), "__metadata__": [1]}, "metadata are no texts"),
        (b"{" + b'"a":[' * 5000, "no JSON"),
    ],
)
def test_headers_are_checked_before_memory_is_allocated(tmp_path, header, message):
    with pytest.raises(FileError, match=message):
        check_safetensors(write(tmp_path / "a.safetensors", header, bytes(8)))


@FUZZ
@given(st.data())
def test_flipped_bytes_of_a_safetensors_file_end_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    safetensors.torch.save_file({"a.weight": torch.ones(5, 3), "b": torch.zeros(2, dtype=torch.int8)}, path, {"k": "v"})
    content = bytearray(path.read_bytes())
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    for _ in range(data.draw(st.integers(1, 4)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with works_or_one_line():
        read_checkpoint(path)


@pytest.fixture
def network():
    onnx = pytest.importorskip("onnx")
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", ports[:1], ports[1:], [weight]), producer_name="qsd"
    )
    model.metadata_props.add(key="qsd", value="{}")
    return model


def test_an_onnx_file_is_read_and_runs(network, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    (tmp_path / "a.onnx").write_bytes(network.SerializeToString())
    read_onnx(tmp_path / "a.onnx")
    with only_opens(tmp_path / "a.onnx"):
        content, metadata = read_onnx(tmp_path / "a.onnx")
    assert metadata == {"qsd": "{}"}
    assert onnxruntime.InferenceSession(content).get_inputs()[0].name == "x"


def _external(network, where):
    tensor = network.graph.initializer[0]
    if where == "attribute":
        node = network.graph.node.add(op_type="Constant", output=["c"])
        attribute = node.attribute.add(name="value", type=4)
        tensor = attribute.t
    if where == "subgraph":
        node = network.graph.node.add(op_type="If", input=["x"], output=["d"])
        attribute = node.attribute.add(name="then_branch", type=5)
        tensor = attribute.g.initializer.add(name="inner")
    if where == "function":
        node = network.functions.add(name="f").node.add(op_type="Constant", output=["c"])
        tensor = node.attribute.add(name="value", type=4).t
    tensor.data_location = 1
    tensor.external_data.add(key="location", value="/etc/passwd")


@pytest.mark.parametrize("where", ["initializer", "attribute", "subgraph", "function"])
def test_tensors_in_other_files_are_refused(network, tmp_path, where):
    _external(network, where)
    (tmp_path / "a.onnx").write_bytes(network.SerializeToString())
    with pytest.raises(FileError, match=r"keeps its tensor .* in '/etc/passwd'"):
        read_onnx(tmp_path / "a.onnx")


def test_operators_of_others_are_refused(network, tmp_path):
    network.graph.node[0].domain = "com.microsoft"
    (tmp_path / "a.onnx").write_bytes(network.SerializeToString())
    with pytest.raises(FileError, match=r"the operator com\.microsoft\.Add"):
        read_onnx(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    "content", [b"", b"text\n" * 9, os.urandom(0) + b"\x89PNG\r\n\x1a\n", b"PK\x03\x04junk", b"\x80\x02}."]
)
def test_files_that_are_no_onnx_files_are_named(tmp_path, content):
    pytest.importorskip("onnx")
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(FileError, match="no ONNX file"):
        read_onnx(tmp_path / "a.onnx")


@FUZZ
@given(st.data())
def test_flipped_bytes_of_an_onnx_file_end_in_one_line(tmp_path_factory, data):
    onnx = pytest.importorskip("onnx")
    path = tmp_path_factory.getbasetemp() / "flipped.onnx"
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    content = bytearray(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [])).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with works_or_one_line():
        read_onnx(path)


def test_plain_values_are_read_as_python_would():
    text = "a = dict(x=1, y=[1, -2.5, (3,), {'k': None}], z=dict())\nb = c = 'text'\nd = {1, 2}\ne = -inf\nf = True\n"
    read = parse_assignments(text, "here")
    expected: dict = {}
    exec(text, {"inf": float("inf")}, expected)
    assert read == expected


@pytest.mark.parametrize(
    "text",
    [
        "import os", "a = open('x')", "a = __import__('os').system('x')", "a = [x for x in ()]", "a = f'{1}'",
        "a = lambda: 0", "a = dict(**{})", "a = dict([1])", "a.b = 1", "a[0] = 1", "a, b = 1, 2", "a = b", "a = 1 + 1",
        "a = {**{}}", "a = {[]: 1}", "a = {([],): 1}", "a = {[1]}", "a += 1", "a: int = 1", "def f(): pass", "1",
        "a = (", "a = os.environ", "a = 'x' % 1", "a = -'x'", "a = " + "[" * 200 + "]" * 200, "a = " + "-" * 3000 + "1",
    ],
)  # fmt: skip
def test_programs_are_refused_and_not_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QsdError) as error:
        parse_assignments(text, "the configuration in a.pth")
    assert "the configuration in a.pth" in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@FUZZ
@given(st.text(alphabet="ab=(){}[]',:1-*\n dict", max_size=60))
def test_any_text_is_read_or_refused(text):
    with works_or_one_line():
        parse_assignments(text, "here")


def test_a_packed_file_opens_no_other_and_builds_registered_models_alone(tmp_path):
    import timm

    import qsd

    sizes = {"embed_dims": (8, 8, 8, 8), "num_heads": 2, "depth": 4, "num_classes": 3}
    path = tmp_path / "a.safetensors"
    qsd.save_packed(timm.create_model("qsd_tiny", **sizes), path)
    qsd.load_packed(path)
    with only_opens(path):
        qsd.load_packed(path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header, data = json.loads(path.read_bytes()[8 : 8 + length]), path.read_bytes()[8 + length :]
    notes = json.loads(header["__metadata__"]["qsd"])
    elsewhere = {
        "pretrained": True,
        "checkpoint_path": "/etc/passwd",
        "pretrained_cfg_overlay": {"file": "/etc/passwd"},
    }
    notes["model"]["arguments"].update(elsewhere)
    header["__metadata__"]["qsd"] = json.dumps(notes)
    write(path, header, data)
    with only_opens(path), pytest.raises(QsdError, match="would load other files"):
        qsd.load_packed(path)
    notes["model"] = {"name": "hf-hub:timm/resnet18.a1_in1k", "arguments": {}}
    header["__metadata__"]["qsd"] = json.dumps(notes)
    write(path, header, data)
    with only_opens(path), pytest.raises(QsdError, match=r"not registered|does not fit"):
        qsd.load_packed(path)
