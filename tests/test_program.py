"""The frame of all commands: one line for an error, exit codes, signals."""

import os
import signal
from pathlib import Path

import pytest

from qsd import QsdError, program


def raising(error):
    def action(_words):
        raise error

    return action


class OutOfMemoryError(RuntimeError):
    """Named like PyTorch's."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (QsdError("a wrong value;\n  mend it"), 2),
        (FileNotFoundError(2, "No such file", "there"), 2),
        (OutOfMemoryError("no memory"), 2),
        (ZeroDivisionError("by zero"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(0), 0),
        (SystemExit(143), 143),
        (SystemExit("stopped"), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(error, code):
    assert program.run("qsd", raising(error), []) == code


def test_a_mistake_is_one_line_without_a_traceback(capsys):
    program.run("qsd", raising(FileNotFoundError("a wrong value;\n  mend it")), [])
    assert capsys.readouterr().err == "qsd: error: a wrong value; mend it (--traceback shows where)\n"


def test_a_line_break_in_the_name_of_a_file_is_visible(capsys):
    program.run("qsd", raising(QsdError("there is no file 'a\nb.jpg'")), [])
    assert capsys.readouterr().err == "qsd: error: there is no file 'a\\nb.jpg' (--traceback shows where)\n"


def test_an_unforeseen_error_is_one_line_that_names_the_file_of_its_traceback(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program.run("qsd", raising(ZeroDivisionError("by zero")), [])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qsd: error: ZeroDivisionError: by zero (the traceback is in ")
    (file,) = tmp_path.iterdir()
    assert str(file) in line
    assert "in action" in Path(file).read_text()


def test_a_full_temporary_folder_leaves_one_line(capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert program.run("qsd", raising(ZeroDivisionError("by zero")), []) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError: by zero (its traceback cannot be written: " in line
    assert line.endswith("--traceback shows it)")


def test_with_traceback_errors_pass_through_and_the_option_does_not():
    seen = []
    assert program.run("qsd", seen.append, ["a", "--traceback", "b"]) == 0
    assert seen == [["a", "b"]]
    with pytest.raises(ZeroDivisionError):
        program.run("qsd", raising(ZeroDivisionError()), ["--traceback"])


def test_sigterm_lets_a_command_clean_up_and_gives_143():
    cleaned, before = [], signal.getsignal(signal.SIGTERM)

    def action(_words):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    assert program.run("qsd", action, []) == 143
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) == before


def test_existing_files_are_refused_unless_forced(tmp_path):
    (tmp_path / "b").write_text("precious")
    paths = [tmp_path / name for name in "ab"]
    with pytest.raises(QsdError, match="b exists; pass --force"):
        program.refuse_existing(paths, False)
    program.refuse_existing(paths, True)
    program.refuse_existing(paths[:1], False)
