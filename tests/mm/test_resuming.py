"""Which checkpoint a training goes on from, where some are damaged."""

import logging
import os

import pytest
import torch

from qsd import QsdError
from qsd.mm.resuming import check_resumable, checkpoint_to_resume
from tests.helpers.files import save_payload

GOOD = {"state_dict": {"a": torch.zeros(3)}, "message_hub": {}, "meta": {"epoch": 1, "iter": 4}, "optimizer": {}}


@pytest.fixture
def run(tmp_path):
    """Three checkpoints, of which the last one is noted."""
    for number in (1, 2, 3):
        torch.save(GOOD, tmp_path / f"iter_{number}.pth")
        os.utime(tmp_path / f"iter_{number}.pth", (number, number))
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_3.pth"))
    return tmp_path


def test_the_noted_checkpoint_is_taken(run):
    (run / "last_checkpoint").write_text(str(run / "iter_2.pth"))
    assert checkpoint_to_resume(run) == str(run / "iter_2.pth")


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert checkpoint_to_resume(tmp_path) is None
    assert checkpoint_to_resume(tmp_path / "gone") is None


def _cut(path):
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    "spoil",
    [
        _cut,
        lambda p: p.write_bytes(b""),
        lambda p: p.write_text("text"),
        lambda p: p.unlink(),
        lambda p: torch.save({"other": 1}, p),
        lambda p: torch.save({**GOOD, "meta": {"epoch": "one"}}, p),
    ],
)
def test_the_one_before_a_damaged_one_is_taken_and_said(run, spoil, caplog):
    spoil(run / "iter_3.pth")
    with caplog.at_level(logging.WARNING, "qsd"):
        assert checkpoint_to_resume(run) == str(run / "iter_2.pth")
    assert "iter_3.pth" in caplog.text
    assert "Resuming from the one before it" in caplog.text


def test_only_damaged_ones_are_refused_with_one_line(run):
    for path in run.glob("*.pth"):
        _cut(path)
    with pytest.raises(QsdError, match=r"none of the 3 checkpoint\(s\)") as error:
        checkpoint_to_resume(run)
    assert "\n" not in str(error.value)


def test_a_payload_that_the_note_names_does_not_run(run, tmp_path_factory):
    evil = save_payload(tmp_path_factory.mktemp("evil") / "evil.pth", run / "mark", **GOOD)
    (run / "last_checkpoint").write_text(str(evil))
    assert checkpoint_to_resume(run) == str(run / "iter_3.pth")
    assert not (run / "mark").exists()


@pytest.mark.timeout(20)
def test_a_note_that_is_a_pipe_or_no_text_is_passed_over(run):
    for make in (os.mkfifo, lambda p: p.write_bytes(b"\xff\xfe"), lambda p: p.symlink_to("/dev/zero")):
        (run / "last_checkpoint").unlink()
        make(run / "last_checkpoint")
        assert checkpoint_to_resume(run) == str(run / "iter_3.pth")


def test_a_moved_folder_takes_its_checkpoints_along(run):
    (run / "last_checkpoint").write_text("/somewhere/else/iter_3.pth")
    assert checkpoint_to_resume(run) == str(run / "iter_3.pth")


@pytest.mark.parametrize("part", ["state_dict", "message_hub", "meta"])
def test_parts_that_resuming_needs_are_named(part, tmp_path):
    torch.save({key: value for key, value in GOOD.items() if key != part}, tmp_path / "a.pth")
    with pytest.raises(QsdError, match=f"no part '{part}"):
        check_resumable(tmp_path / "a.pth")
