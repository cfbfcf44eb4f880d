"""Checkpoints of any origin: payloads, damage, other formats, other types."""

import argparse
import os
import pickle
import socket
import tarfile
import zipfile

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qsd import QsdError, load_weights
from qsd.distillation import build_teacher
from qsd.models.checkpoints import read_checkpoint
from qsd.reading import CodeError, FileError, read_torch
from qsd.tasks.loading import load_task
from tests.helpers import sample
from tests.helpers.files import only_opens, save_payload, with_member, works_or_one_line, zero_block
from tests.helpers.training import SMALL, make_task

TENSORS = {"a.weight": torch.arange(4096.0), "b": torch.zeros(3, dtype=torch.int64)}


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small checkpoint of a training with its settings, as Lightning writes it."""
    task = make_task(num_classes=10, model_args={**SMALL, "in_chans": 1})
    task.configure_model()
    content = {
        "state_dict": task.state_dict(),
        "hyper_parameters": dict(task.hparams),
        "pytorch-lightning_version": "2.6.1",
        "epoch": 1,
        "global_step": 3,
    }
    path = tmp_path_factory.mktemp("trained") / "small.ckpt"
    torch.save(content, path)
    return path, content


READERS = {
    "read_torch": read_torch,
    "read_checkpoint": read_checkpoint,
    "load_weights": lambda path: load_weights(timm.create_model("qsd_tiny", **SMALL), path),
    "load_task": load_task,
    "teacher": lambda path: build_teacher(str(path)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("way", ["archive", "before 1.6", "pickle"])
def test_a_payload_is_refused_as_code_and_does_not_run(reader, way, tmp_path):
    mark = tmp_path / "mark"
    path = save_payload(tmp_path / "evil.ckpt", mark, way, state_dict=TENSORS)
    with only_opens(path), pytest.raises(CodeError) as error:
        READERS[reader](path)
    assert "this file wants to run code" in one_line(error)
    assert "mkdir" in one_line(error)
    assert not mark.exists()


def test_the_fixture_s_payload_would_run(tmp_path):
    path = save_payload(tmp_path / "evil.ckpt", tmp_path / "mark")
    torch.load(path, weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("member", ["/data/0", "data.pkl", "version"])
def test_a_block_of_zeros_is_noticed(tmp_path, member):
    path = tmp_path / "a.ckpt"
    torch.save(TENSORS, path)
    assert torch.equal(read_torch(path)["a.weight"], TENSORS["a.weight"])
    zero_block(path, member)
    with pytest.raises(FileError, match=r"check sum of its part .* is wrong"):
        read_torch(path)


def test_archives_without_sums_are_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(TENSORS, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_torch(tmp_path / "a.pth").keys() == TENSORS.keys()


def test_the_format_before_1_6_is_read(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_torch(tmp_path / "a.pth")["a.weight"], TENSORS["a.weight"])


def test_settings_of_scripts_and_numbers_of_both_numpy_versions_are_read(tmp_path):
    torch.save({"args": argparse.Namespace(lr=1e-3), "best": np.float64(0.5)}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["best"] == 0.5
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        content = archive.read(name)
    old = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with_member(tmp_path / "a.pth", "data.pkl", old)
    assert read_checkpoint(tmp_path / "a.pth")["best"] == 0.5


def _zip_of(path, name):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "x")


def _deflated(path):
    torch.save({"w": torch.zeros(100_000)}, path)
    content = zipfile.ZipFile(path)
    members = [(i.filename, content.read(i)) for i in content.infolist()]
    content.close()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)


def _tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b""), "an empty file"),
        (lambda p: p.write_text("weights: none\n" * 400), "a text file"),
        (lambda p: p.write_text('{"state_dict": {}}'), "a JSON document"),
        (lambda p: p.write_text("<!DOCTYPE html><html>not found</html>"), "a web page"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"), "a Git LFS pointer"),
        (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "a PNG image"),
        (lambda p: p.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "a gzip archive"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
        (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00" + bytes(99)), "a NumPy array"),
        (lambda p: p.write_bytes(b'\x40\0\0\0\0\0\0\0{"a":{}}' + bytes(80)), "a safetensors file"),
        (lambda p: p.write_bytes(os.urandom(1) * 0 + b"\xfe\xed" * 50), "damaged, incomplete or no checkpoint"),
        (lambda p: p.write_bytes(pickle.dumps(range(5))), r"wants to run code \(builtins.range\)"),
        (lambda p: _zip_of(p, "word/document.xml"), "a zip archive, but no checkpoint: it holds word/document.xml"),
        (lambda p: _zip_of(p, "net/code/__torch__.py"), "a TorchScript program"),
        (_deflated, "compressed members"),
        (_tar, "damaged, incomplete or no checkpoint"),
        (lambda p: p.mkdir(), "is no file: it is a folder"),
        (os.mkfifo, "is no file: it is a named pipe"),
        (lambda p: p.symlink_to("/dev/zero"), "is no file: it is a device"),
        (lambda p: p.symlink_to(p.with_name("gone")), "does not exist"),
        (lambda p: p.symlink_to(p), "cannot be reached: Too many levels"),
    ],
)
@pytest.mark.parametrize("ending", [".ckpt", ".pth"])
def test_files_of_other_kinds_are_named(write, message, ending, tmp_path):
    path = tmp_path / f"file{ending}"
    write(path)
    with pytest.raises(FileError, match=message) as error:
        read_checkpoint(path)
    one_line(error)


def test_sockets_and_names_that_no_file_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("a.pth")
        with pytest.raises(FileError, match="is no file: it is a socket"):
            read_checkpoint("a.pth")
    with pytest.raises(FileError, match="cannot be reached"):
        read_checkpoint("a\0.pth")
    with pytest.raises(FileError, match="cannot be reached: File name too long"):
        read_checkpoint("a" * 999 + ".pth")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("hyper_parameters", [1], "'hyper_parameters' is of type list"),
        ("hyper_parameters", {}, "does not say which model"),
        ("state_dict", 3, "'state_dict' is of type int"),
        ("state_dict", None, "no part 'state_dict'"),
        ("state_dict", {"model.head.weight": "text"}, "a str named 'model.head.weight'"),
        ("state_dict", {}, "has nothing in its state_dict"),
    ],
)
def test_parts_of_other_types_are_named(trained, tmp_path, part, value, message):
    torch.save({**trained[1], part: value}, tmp_path / "a.ckpt")
    with pytest.raises(QsdError, match=message) as error:
        load_task(tmp_path / "a.ckpt")
    one_line(error)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "hf-hub:timm/resnet18.a1_in1k", "not registered with timm"),
        ("model", "local-dir:/etc", "not registered with timm"),
        ("model", "https://example.org/net", "not registered with timm"),
        ("model", 3, "not registered with timm"),
        ("model_args", [1], "no dictionary"),
        ("model_args", {1: 2}, "no dictionary"),
        ("model_args", {"depth": 10**9}, "depth=1000000000"),
        ("model_args", {"depth": 10**5}, "rule out"),
        ("model_args", {"embed_dims": [2**23] * 4}, "rule out"),
        ("num_classes", 10**8, "rule out"),
        ("model_args", {"depth": "many"}, r"cannot be|hyper_parameters of"),
        ("model_args", {"unknown": 1}, r"cannot be|hyper_parameters of"),
        ("num_classes", "ten", r"cannot be|hyper_parameters of"),
        ("num_classes", -1, "num_classes=-1"),
        ("mixup", "a", r"cannot be|hyper_parameters of"),
        ("label_smoothing", 9, "label_smoothing=9"),
    ],
)
def test_settings_that_cannot_be_are_named(trained, tmp_path, key, value, message):
    settings_ = {**trained[1]["hyper_parameters"], key: value}
    torch.save({**trained[1], "hyper_parameters": settings_}, tmp_path / "a.ckpt")
    for reader in [load_task] + ([READERS["teacher"]] if key.startswith("model") else []):
        with only_opens(tmp_path / "a.ckpt"), pytest.raises(QsdError, match=message) as error:
            reader(tmp_path / "a.ckpt")
        one_line(error)


@pytest.mark.parametrize("reader", ["load_task", "teacher"])
def test_a_model_far_larger_than_its_tensors_is_not_built(trained, tmp_path, reader):
    settings_ = {**trained[1]["hyper_parameters"], "model": "vit_giant_patch14_224", "model_args": {}}
    torch.save({**trained[1], "hyper_parameters": settings_}, tmp_path / "a.ckpt")
    with pytest.raises(QsdError, match=r"'vit_giant_patch14_224' of 1\d{9} numbers, and holds \d+; it is damaged"):
        READERS[reader](tmp_path / "a.ckpt")


@pytest.mark.parametrize("reader", ["load_task", "teacher"])
def test_weights_that_a_file_names_are_not_opened(trained, tmp_path, reader):
    other = save_payload(tmp_path / "other.pth", tmp_path / "mark")
    arguments = {
        **trained[1]["hyper_parameters"]["model_args"],
        "pretrained": True,
        "checkpoint_path": str(other),
        "pretrained_cfg_overlay": {"file": str(other)},
        "cache_dir": str(tmp_path),
    }
    changed = {**trained[1]["hyper_parameters"], "model_args": arguments, "init_from": str(other)}
    torch.save({**trained[1], "hyper_parameters": changed}, tmp_path / "a.ckpt")
    with only_opens(tmp_path / "a.ckpt"):
        loaded = READERS[reader](tmp_path / "a.ckpt")
    network = loaded.model if reader == "load_task" else loaded.network
    expected = trained[1]["state_dict"]["model.stem.downsample.proj.conv.weight"]
    if reader == "load_task":
        assert torch.equal(network.stem.downsample.proj.conv.weight, expected)
    assert not (tmp_path / "mark").exists()


def test_reading_opens_the_given_file_alone(trained):
    with only_opens(trained[0]):
        load_task(trained[0])
        read_checkpoint(trained[0])


def test_the_watch_sees_other_files(tmp_path):
    with pytest.raises(AssertionError, match="open of"), only_opens():
        (tmp_path / "other").write_text("x")


FUZZ = settings(max_examples=sample(10, 500), deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(st.data())
def test_flipped_bytes_end_in_one_line(trained, tmp_path_factory, data):
    whole = trained[0].read_bytes()
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(1, 4)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.ckpt"
    path.write_bytes(content)
    with works_or_one_line():
        load_task(path)


@FUZZ
@given(st.data())
def test_flipped_bytes_of_a_pickle_with_right_sums_end_in_one_line(trained, tmp_path_factory, data):
    with zipfile.ZipFile(trained[0]) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        content = bytearray(archive.read(name))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "pickle.ckpt"
    path.write_bytes(trained[0].read_bytes())
    with_member(path, "data.pkl", bytes(content))
    with works_or_one_line():
        load_task(path)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**40), st.floats(), st.text(max_size=5), st.just([]), st.just({})
)


@FUZZ
@given(st.data())
def test_fields_dropped_retyped_and_enlarged_end_in_one_line(trained, tmp_path_factory, data):
    content = {**trained[1], "hyper_parameters": dict(trained[1]["hyper_parameters"])}
    settings_ = content["hyper_parameters"]
    settings_["model_args"] = dict(settings_["model_args"])
    settings_["compile"] = False
    part = data.draw(st.sampled_from([content, settings_, settings_["model_args"]]))
    key = data.draw(st.sampled_from([k for k in part if k != "compile"]))
    if data.draw(st.booleans()):
        del part[key]
    else:
        part[key] = data.draw(VALUES)
    path = tmp_path_factory.getbasetemp() / "fields.ckpt"
    torch.save(content, path)
    with works_or_one_line():
        load_task(path)
