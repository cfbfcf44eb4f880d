"""A file under its name is complete, whatever happens while it is written."""

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qsd import QsdError
from qsd.files import replace_content, replacing, replacing_together
from tests.helpers.files import full_disk


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    return path


def test_a_file_gets_its_name_when_it_is_complete(path):
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == path.parent  # one disk: the renaming is one step
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError("disk is full")])
def test_a_failure_in_the_middle_leaves_the_old_file(path, error):
    def write():
        with replacing(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises((type(error), QsdError)) as caught:
        write()
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]
    if isinstance(error, OSError):
        assert str(caught.value) == f"{path} cannot be written: disk is full."


def test_a_failure_of_the_renaming_leaves_the_old_file(path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(QsdError, match="cannot be written"), replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]


def test_content_and_name_reach_the_disk_in_this_order(path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (done.append(name), original(*a)))
    with replacing(path) as partial:
        partial.write_text("new")
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the folder


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permission_bits_are_those_of_an_ordinary_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "ordinary").write_text("")
        with replacing(tmp_path / "replaced") as partial:
            partial.unlink()  # as some writers do, which then write with other bits
            partial.touch(0o600)
    finally:
        os.umask(before)
    bits = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "replaced")]
    assert bits[0] == bits[1] == 0o666 & ~umask


def test_a_long_name_and_two_writers_at_once(tmp_path):
    path = tmp_path / ("x" * 250)
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the last to end
    with pytest.raises(QsdError, match="missing does not exist; make it first"), replacing(tmp_path / "missing/x"):
        pass


def test_several_files_appear_together_or_not_at_all(tmp_path):
    folder = tmp_path / "new" / "folder"
    with replacing_together(folder) as partial:
        for name in ("a", "b"):
            (partial / name).write_text("new")
        assert [p.name for p in folder.iterdir()] == [partial.name]
    assert sorted(os.listdir(folder)) == ["a", "b"]

    def fail():
        with replacing_together(folder) as partial:
            (partial / "a").write_text("newer")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"a": "new", "b": "new"}
    with pytest.raises(QsdError, match="cannot be written to"), replacing_together(Path(__file__)):
        pass


KILLED = """
import os, sys
from qsd.files import replacing, replacing_together
with replacing_together(sys.argv[1]) as partial, replacing(sys.argv[1] + "/c") as other:
    (partial / "a").write_text("half")
    other.write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_the_next_writer_removes_files_of_a_killed_one_and_no_other(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    (part,) = tmp_path.glob(".c.*.part")
    os.utime(part, (0, 0))
    assert len(list(tmp_path.glob(".unfinished-*"))) == 1
    with replacing_together(tmp_path) as first, replacing_together(tmp_path) as second:
        assert set(tmp_path.glob(".unfinished-*")) == {first, second}
        (first / "a").write_text("first")
    with replacing(tmp_path / "c") as first:
        os.utime(first, (0, 0))  # as if it took hours
        with replacing(tmp_path / "c") as second:
            second.write_text("second")
        first.write_text("first")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "first", "c": "first"}


def test_content_is_replaced_in_one_step_and_leaves_nothing_behind(path, monkeypatch):
    umask = os.umask(0o027)
    try:
        replace_content(path, b"new")
        assert path.read_bytes() == b"new"
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        with monkeypatch.context() as patch:
            patch.delattr(os, "O_TMPFILE")  # another system
            replace_content(path, memoryview(b"newer"))
    finally:
        os.umask(umask)
    assert path.read_bytes() == b"newer"
    with full_disk(), pytest.raises(QsdError, match=r"results.json cannot be written: .*No space left on device"):
        replace_content(path, b"newest")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(QsdError, match="cannot be written: no"):
        replace_content(path, b"newest")
    assert path.read_bytes() == b"newer"
    assert os.listdir(path.parent) == [path.name]


TENSORS = {"a": torch.zeros(5000)}


@pytest.mark.parametrize(
    "write",
    [lambda p: p.write_bytes(bytes(5000)), lambda p: torch.save(TENSORS, p), lambda p: save_file(TENSORS, p)],
    ids=["text", "torch", "safetensors"],
)
def test_a_disk_that_is_full_is_one_line_whoever_writes(path, write):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with replacing(path) as partial:
                write(partial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.raises(QsdError, match=r"results\.json cannot be written"):
        fill()
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]
