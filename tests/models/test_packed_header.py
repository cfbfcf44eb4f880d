"""Packed files whose header, or whose sizes, were tampered with: one line, before memory is allocated."""

import json
import tracemalloc
import zlib

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qsd import QsdError, load_packed, save_packed, to_spike_driven
from qsd.models.packed_header import read_header
from tests.helpers import sample
from tests.helpers.mutations import changed, enlarged, paths, problem, retyped, value_at, without
from tests.helpers.networks import SMALL


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Header and tensors of a packed spiking network with quantized merged kernels."""
    path = tmp_path_factory.mktemp("packed") / "spiking.safetensors"
    model = timm.create_model("qsd_tiny", **SMALL).eval()
    save_packed(to_spike_driven(model, merged_bits=5), path, {"class_names": ["a"]})
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["qsd"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def load(tmp_path, stored):
    def load(header, tensors=None):
        path = tmp_path / "spiking.safetensors"
        try:
            safetensors.torch.save_file({**stored[1], **(tensors or {})}, path, {"qsd": json.dumps(header)})
        except KeyError as error:  # complex numbers, before safetensors 0.5
            pytest.skip(f"this safetensors has no {error}")
        return load_packed(path)

    return load


def read(header):
    return read_header(json.dumps(header), "x.safetensors")


def first_of_many(header):
    """The header with one entry in each table that has one per layer."""
    tables = {key: dict(list(header[key].items())[:1]) for key in ("time_steps", "packed")}
    delays = dict(list(header["conversion"]["delays"].items())[:1])
    return {**header, **tables, "conversion": {**header["conversion"], "delays": delays}}


def test_each_field_of_the_header_that_does_not_fit_is_named(stored):
    header = first_of_many(stored[0])
    assert read(header).model_dump() == header
    for path in paths(header, free=("notes", "arguments")):
        if (path[0] in ("time_steps", "packed") and len(path) == 2) or path[:-1] == ("conversion", "delays"):
            continue  # names of layers, which the model is compared with
        if isinstance(path[-1], str) and path not in (("version",), ("packed",)):
            assert path[-1] in problem(read, without(header, path)), path
        for other in retyped(value_at(header, path)):
            message = problem(read, changed(header, path, other))
            assert message is None or str(path[0]) in message, (path, other)
        if path[-1] not in ("notes", "parameters"):
            assert problem(read, enlarged(header, path)) is not None, path
    for path in ((), ("model",), ("conversion",), ("packed", next(iter(header["packed"])))):
        assert "surprise" in problem(read, changed(header, (*path, "surprise"), 1))


@settings(max_examples=sample(30, 500), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_header_is_read_or_refused_in_one_line(stored, data):
    header = first_of_many(stored[0])
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=2), max_leaves=4)
    problem(read, changed(header, data.draw(st.sampled_from(paths(header))), data.draw(values)))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "arguments", "depth"), 10**6, "build a larger one"),
        (("model", "arguments", "embed_dims"), [10**5] * 4, "does not fit the model"),
        (("model", "arguments", "embed_dims"), "eight", "four positive sizes are needed"),
        (("model", "arguments", "embed_dims"), [10**9] * 4, "is larger than 1048576"),
        (("model", "arguments", "pretrained_cfg"), {"file": "x"}, "the argument pretrained_cfg would load other files"),
        (("conversion", "example"), [1, 3, 10**5, 10**5], "values are more than"),
        (("conversion", "example"), [1, 7, 32, 32], ""),
        (("conversion", "dtype"), "int8", "conversion.dtype"),
        (("conversion", "merged_bits"), None, "merged kernel"),
        (("conversion",), None, "only a spiking network has one"),
    ],
    ids=str,
)
def test_absurd_settings_are_refused_in_one_line(load, stored, path, value, message):
    assert message in problem(load, changed(stored[0], path, value))


def test_a_stream_that_grows_beyond_its_shape_is_not_expanded(load, stored):
    header, name = stored[0], "head.weight"
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(10**8), 9)), dtype=torch.uint8)
    spoilt = changed(header, ("packed", name, "deflated"), True)
    assert "it is damaged" in _refused_cheaply(load, spoilt, {name: bomb})
    # The shape says so too: ten thousand times the data.
    spoilt["packed"][name]["shape"] = [10**8 * 8 // header["packed"][name]["bits"]]
    assert "it is damaged" in _refused_cheaply(load, spoilt, {name: bomb})


def _refused_cheaply(load, header, tensors):
    tracemalloc.start()
    try:
        with pytest.raises(QsdError) as caught:
            load(header, tensors)
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()
    return str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"head.weight": torch.zeros(3, dtype=torch.int8)}, "it is damaged"),
        ({"head.bias": torch.zeros(5, dtype=torch.int64)}, "head.bias is int64 in the file, float32 in the model"),
        ({"head.bias": torch.zeros(5, dtype=torch.complex64)}, "it is damaged"),
        ({"merged/none.scale": torch.zeros(1)}, "its merged kernel none.scale is not one of its model"),
    ],
    ids=str,
)
def test_tensors_of_another_kind_are_refused_in_one_line(load, stored, tensors, message):
    with pytest.raises(QsdError) as caught:
        load(stored[0], tensors)
    assert message in str(caught.value)
