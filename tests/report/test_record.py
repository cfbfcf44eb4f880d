"""Records are read back as they were written; a field that does not fit is one line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsd import QsdError
from qsd.report import Record, html
from tests.helpers import sample
from tests.helpers.mutations import changed, enlarged, paths, problem, retyped, value_at, without

# Fields with a default, or that a file of another kind of network lacks.
OPTIONAL = {"version", "largest_difference", "other_regions", "file_bytes", "code", "codes", "shift"}
OPTIONAL |= {"effective", "float_twin", "lemaire", "moved", "arithmetic_mj", "memory_mj", "break_even", "prices"}
OPTIONAL |= {"with_memory_mj", "neurobench", "float_mac_pj", "activity", "matrices", "stage", "attn", "frames"}


@pytest.fixture
def content(made_up_record):
    return made_up_record(layers=2).to_dict()


def read(content):
    return Record.from_json(json.dumps(content), "conversion.json")


def message_of(content):
    with pytest.raises(QsdError) as caught:
        read(content)
    message = str(caught.value)
    assert message.startswith("conversion.json ")
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_a_record_is_read_as_it_was_written(made_up_record, tmp_path):
    record = made_up_record()
    (tmp_path / "conversion.json").write_text(record.to_json())
    assert Record.read(tmp_path / "conversion.json") == record
    assert record.to_dict()["version"] == 1


def test_a_field_that_is_missing_is_named(content):
    for path in paths(content):
        if isinstance(path[-1], str) and path[-1] not in OPTIONAL:
            message = message_of(without(content, path))
            assert path[-1] in message or path[-1] == "kind", (path, message)
            assert "write it again with `qsd convert`" in message


def test_an_unknown_field_is_named(content):
    for path in [(), *paths(content)]:
        if isinstance(value_at(content, path), dict):
            assert "surprise" in message_of(changed(content, (*path, "surprise"), 1)), path


def test_a_field_of_another_type_is_named_or_means_the_same(content):
    for path in list(paths(content))[:: sample(3, 1)]:
        value = value_at(content, path)
        for other in retyped(value):
            spoilt = changed(content, path, other)
            message = problem(read, spoilt)
            if message is None:  # several types are allowed, such as None
                assert read(spoilt).to_dict() == spoilt or path[-1] in OPTIONAL, (path, other)
            else:
                assert str(path[0]) in message, (path, other, message)


def test_absurd_sizes_and_depths_are_one_line(content):
    for path in paths(content):
        problem(read, enlarged(content, path))
    deep = json.dumps(content)[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    with pytest.raises(QsdError, match=r"conversion\.json"):
        Record.from_json(deep, "conversion.json")


@settings(max_examples=sample(25, 500), deadline=None)
@given(st.data())
def test_whatever_stands_in_a_field_is_read_or_one_line(made_up_record_once, data):
    content = made_up_record_once
    path = data.draw(st.sampled_from(paths(content)))
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    value = data.draw(st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.text(max_size=3), inner, max_size=2), max_leaves=4))  # fmt: skip
    problem(read, changed(content, path, value))


@pytest.mark.parametrize("cut", [0, 1, 100, -2])
def test_a_file_that_is_cut_off_says_so(made_up_record, tmp_path, cut):
    path = tmp_path / "conversion.json"
    path.write_text(made_up_record().to_json().rstrip()[:cut])
    with pytest.raises(QsdError, match="is no JSON or is cut off"):
        Record.read(path)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(QsdError, match="cannot be read"):
            Record.read(missing)


def test_a_newer_version_asks_for_an_update(content):
    assert "has version 2 of the format; this qsd reads 1: update it" in message_of({**content, "version": 2})
    assert "holds a JSON list instead of an object" in message_of([])


@pytest.mark.usefixtures("undrawn")
def test_a_record_of_the_first_release_is_read(content):
    """Version 0.1.0 wrote neither a version nor a kind, and True or False for the merging."""
    del content["version"], content["accuracy"]["kind"]
    for compared in content["comparison"]:
        del compared["largest_difference"], compared["other_regions"]
    for merge, word in ((True, "all"), (False, "none"), ("rep", "rep")):
        content["conversion"]["merge"] = merge
        record = read(content)
        assert (record.version, record.accuracy.kind, record.conversion.merge) == (1, "classifier", word)
        assert html(record)
    metric = {"name": "coco/bbox_mAP_50", "quantized": 0.5, "spiking": 0.5}
    accuracy = {"images": 200, "way": "count", "dtype": "float32", "metrics": [metric]}
    assert read({**content, "accuracy": accuracy}).accuracy.kind == "detector"
    content["neurons"][0]["name"] = "decode_head.neuron"
    assert read({**content, "accuracy": accuracy}).accuracy.kind == "segmenter"
    del content["accuracy"]["quantized"]
    assert "accuracy.classifier.quantized: field required" in message_of(content)
