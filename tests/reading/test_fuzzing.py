"""Files that are damaged or made to harm, by the readers that use them: each try works, or ends in one line.

Checkpoints, safetensors, ONNX files and images have tries of the same kind beside their other tests.
"""

import json

import pytest
import timm
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qsd import QsdError, load_packed, save_packed, to_spike_driven
from qsd.commands.data import _data_of
from qsd.commands.predictor import Predictor
from qsd.export.notes import read_note
from qsd.image_notes import read_image_notes
from qsd.models.checkpoints import read_checkpoint
from tests.helpers import CONFIGS, sample
from tests.helpers.files import works_or_one_line
from tests.helpers.mutations import changed, enlarged, paths, value_at, without

LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)


def tries(short):
    return settings(max_examples=sample(short, 500), deadline=None, suppress_health_check=list(HealthCheck))


def flipped(data, whole):
    """Bytes cut off, changed, or both."""
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(1, 4)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    return bytes(content)


def spoilt(data, content, free=()):
    """A field dropped, retyped, enlarged, or added."""
    path = data.draw(st.sampled_from(paths(content, free)))
    way = data.draw(st.sampled_from(["drop", "retype", "enlarge", "add"]))
    if way == "drop":
        return without(content, path)
    if way == "enlarge":
        return enlarged(content, path)
    inner = value_at(content, path)
    return changed(
        content, (*path, "surprise") if way == "add" and isinstance(inner, dict) else path, data.draw(VALUES)
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The bytes of a packed spiking network, and a place to spoil them."""
    path = tmp_path_factory.mktemp("packed") / "a.safetensors"
    model = timm.create_model("csdformer_4_256", embed_dims=8, num_heads=2, depth=1, num_classes=3, weight_bits=4)
    facts = {"class_names": ["a", "b", "c"], "mean": [0.5] * 3, "std": [0.5] * 3, "img_size": [8, 8]}
    save_packed(to_spike_driven(model.eval()), path, facts)
    return path.read_bytes(), path


@tries(10)
@given(st.data())
def test_flipped_bytes_of_a_packed_file(packed, data):
    packed[1].write_bytes(flipped(data, packed[0]))
    for read in (load_packed, read_checkpoint):
        with works_or_one_line():
            read(packed[1])


def _with_header(whole, change):
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["__metadata__"]["qsd"] = json.dumps(change(json.loads(header["__metadata__"]["qsd"])))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


@tries(10)
@given(st.data())
def test_fields_of_a_packed_file(packed, data):
    packed[1].write_bytes(_with_header(packed[0], lambda header: spoilt(data, header)))
    for read in (load_packed, Predictor):
        with works_or_one_line():
            read(packed[1])


NOTE = {
    "version": 1, "kind": "integer", "time_steps": 4, "image": [3, 8, 8], "inner": {"a": [0.1, 0.2, 3]},
    "notes": {"class_names": ["a", "b"], "mean": [0.5], "std": [0.5], "energy_mj": {"integer": 1.0}},
}  # fmt: skip


@tries(50)
@given(st.data())
def test_notes_of_an_onnx_file(data):
    with works_or_one_line():
        note = read_note({"qsd": json.dumps(spoilt(data, NOTE))}, "a.onnx")
        read_image_notes({**note["notes"], "img_size": note["image"][1:]}, "a.onnx")


@tries(50)
@given(st.data())
def test_flipped_bytes_of_a_note(data):
    text = flipped(data, json.dumps(NOTE).encode()).decode("latin-1")
    with works_or_one_line():
        read_note({"qsd": text}, "a.onnx")


@tries(25)
@given(st.data())
def test_flipped_bytes_of_a_configuration(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "flipped.yaml"
    path.write_bytes(flipped(data, (CONFIGS / "digits.yaml").read_bytes()))
    with works_or_one_line():
        _data_of(path)


@tries(25)
@given(st.data())
def test_fields_of_a_configuration(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fields.yaml"
    content = spoilt(data, yaml.safe_load((CONFIGS / "digits.yaml").read_text()))
    try:
        path.write_text(yaml.safe_dump(content))
    except RecursionError:  # hundreds of lists within lists, which PyYAML does not write
        path.write_text("data: " + "[" * 500 + "]" * 500)
    with works_or_one_line():
        _data_of(path)


@pytest.mark.parametrize(
    "text", ["a: " + "[" * 5000, "a: 2001-99-99", "a: !!python/object/apply:os.system [x]", "\x00"]
)
def test_texts_that_are_no_configuration_are_one_line(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(QsdError, match="is no YAML"):
        _data_of(tmp_path / "a.yaml")


def test_a_class_list_that_does_not_fit_and_images_that_do_not_are_named(packed):
    for change, message in (
        (lambda header: changed(header, ("notes", "class_names"), ["a"]), "names 1 classes, its network has 3"),
        (lambda header: changed(header, ("notes", "std"), [0.0] * 3), "should be greater than 0"),
        (lambda header: changed(header, ("notes", "std"), [0.5] * 2), "3 means for 2 deviations"),
        (lambda header: changed(header, ("notes", "mean"), [0.5]), "1 means for 3 deviations"),
    ):
        packed[1].write_bytes(_with_header(packed[0], change))
        with pytest.raises(QsdError, match=message):
            Predictor(packed[1]).logits(torch.zeros(1, 3, 8, 8))
