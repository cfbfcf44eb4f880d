"""The configurations that come with the package, found as ``configs/NAME`` from any folder."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from qsd.errors import QsdError

_OPTIONS = ("--config", "-c")


def configuration_folder() -> Path:
    """The folder of the configurations: within an installed package, beside the package in a clone."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_configuration(path: str | Path) -> Path:
    """The file that a path names: a file of the user, or else the configuration ``configs/NAME`` of the package.

    Args:
        path: The path that the user gave.

    Raises:
        QsdError: If there is neither; the message names the nearest configuration of the package.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        return path
    if path.parts[:1] == ("configs",) and ".." not in path.parts:
        shipped = configuration_folder().joinpath(*path.parts[1:])
        if shipped.is_file():
            return shipped
    names = [file.name for file in configuration_folder().glob("*.*")]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    raise QsdError(f"configuration {path} does not exist{f'; did you mean configs/{near[0]}?' if near else '.'}")


def with_found_configurations(words: Sequence[str]) -> list[str]:
    """Replace the value of each ``--config`` among the arguments by the path of the file.

    Args:
        words: The arguments of a command line.

    Raises:
        QsdError: If a configuration does not exist.
    """
    found = list(words)
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in _OPTIONS and equals:
            found[index] = f"{option}={_found(value)}"
        elif word in _OPTIONS and index + 1 < len(words):
            found[index + 1] = _found(words[index + 1])
    return found


def _found(value: str) -> str:
    # jsonargparse also takes a configuration as text instead of a path.
    return value if "\n" in value or value.lstrip().startswith("{") else str(find_configuration(value))
