"""The frame that all commands run in: parsing, errors as one line, exit codes, signals.

This module imports neither torch nor a training framework, so that every front end can use it.
"""

import argparse
import difflib
import itertools
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from qsd.errors import QsdError

MISTAKE, FAILURE, INTERRUPTED, TERMINATED = 2, 1, 130, 143  # exit codes

_MISTAKES = (QsdError, OSError, UnicodeDecodeError, argparse.ArgumentError)
# Errors of frameworks that the user can mend, by name: this module does not import their packages.
_MISTAKES_BY_NAME = {"OutOfMemoryError", "MisconfigurationException"}
_LONGEST_LINE = 600

Action = Callable[[list[str]], object]


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong argument in one line, with the nearest known option."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        add_traceback_argument(self)

    def error(self, message: str) -> NoReturn:
        """Stop with the message of the parser.

        Args:
            message: The description of the mistake.

        Raises:
            QsdError: Always.
        """
        raise QsdError(parser_message(message, self._option_string_actions))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; an option that is mistyped is named before one that is missing.

        Args:
            args: The arguments; ``None`` for those of the process.
            namespace: The object that takes the values; ``None`` for a new one.
        """
        for word in itertools.takewhile(lambda word: word != "--", sys.argv[1:] if args is None else args):
            option = word.partition("=")[0]
            if option.startswith("--") and not any(known.startswith(option) for known in self._option_string_actions):
                self.error(f"unrecognized arguments: {word}")
        return super().parse_args(args, namespace)


def run(program: str, action: Action, args: Sequence[str] | None = None, *, catch_sigterm: bool = True) -> int:
    """Run a command and report its errors.

    A mistake of the user gives one line on standard error and exit code 2. Any other exception gives one line with its
    type and message, the path of a file with the full traceback, and exit code 1. With ``--traceback`` among the
    arguments exceptions pass through, for the caller to print.

    Args:
        program: The name in front of the messages.
        action: The command, which is called with the arguments. An integer that it returns is the exit code.
        args: The arguments without the name of the program; ``None`` for those of the process.
        catch_sigterm: Whether SIGTERM ends the command by an exception, which lets it remove unfinished files.

    Returns:
        The exit code: 0, 1 or 2 as above, 130 after Ctrl-C, 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if args is None else args)
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        with _sigterm_as_exit() if catch_sigterm else _nothing():
            result = action(words)
        return result if isinstance(result, int) else 0
    except SystemExit as error:
        if error.code not in (None, 0, TERMINATED) and show_traceback:
            raise
        return exit_code(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if show_traceback:
            raise
        print(f"{program}: error: {_report(error)}", file=sys.stderr)
        return exit_code(error)


def exit_code(error: BaseException) -> int:
    """The exit code that belongs to an exception.

    Args:
        error: The exception that ended a command.
    """
    if isinstance(error, SystemExit):
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into an exit of its own
            return INTERRUPTED
        return error.code if isinstance(error.code, int) else 0 if error.code is None else MISTAKE
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    names = {kind.__name__ for kind in type(error).__mro__}
    return MISTAKE if isinstance(error, _MISTAKES) or names & _MISTAKES_BY_NAME else FAILURE


def one_line(text: object) -> str:
    """A text as one line of limited length.

    Args:
        text: The text, or an exception.
    """
    line = " ".join(str(text).split())
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..."


def parser_message(message: str, options: Iterable[str]) -> str:
    """The message of a parser in one line, with the option that a mistyped one resembles.

    Args:
        message: The message, which names the mistyped option.
        options: The known options.
    """
    known = {option for option in options if option.startswith("--")}
    for word in re.findall(r"--[\w.+-]+", message):
        whole, first = word.rstrip("+."), word.partition(".")[0]
        near = difflib.get_close_matches(whole, known, n=1, cutoff=0.7)
        if not near and first not in known:
            near = difflib.get_close_matches(first, known, n=1, cutoff=0.7)
        if near and word not in known:
            return f"{one_line(message)}; did you mean {near[0]}?"
    return one_line(message)


def add_traceback_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--traceback`` to the help; `run` takes it from the arguments before they are parsed.

    Args:
        parser: The parser of a command.
    """
    parser.add_argument("--traceback", action="store_true", help="show where an error occurred")


def refuse_existing(paths: Iterable[str | Path], force: bool) -> None:
    """Refuse to replace files, unless the user wants that.

    Args:
        paths: The files that a command is about to write.
        force: Whether existing files may be replaced.

    Raises:
        QsdError: If one exists and ``force`` is not set.
    """
    existing = [path for path in paths if Path(path).exists()]
    if existing and not force:
        raise QsdError(f"{existing[0]} exists; pass --force to replace it, or choose another --out.")


def _report(error: Exception) -> str:
    if exit_code(error) == MISTAKE:
        text = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:  # without the error's number
            text = f"{error.filename}: {error.strerror}."
        return f"{' '.join(text.split())} (--traceback shows where)"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="qsd-traceback-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
        place = f"the traceback is in {file.name}"
    except OSError as fault:  # such as a full temporary folder
        place = f"its traceback cannot be written: {one_line(fault)}; --traceback shows it"
    return f"{type(error).__name__}: {one_line(error)} ({place})"


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> Any:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
