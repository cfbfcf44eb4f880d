"""The configurations that come with the package, found as ``configs/NAME`` from any folder."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml

from qsd.errors import QsdError

_OPTIONS = ("--config", "-c")
_MOST_ENTRIES = 1_000_000  # of a configuration; references to references could stand for any number


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


def read_configuration(path: Path) -> str:
    """The text of a configuration in YAML, in which no name stands twice: the parser would take the last one alone.

    Args:
        path: The file.

    Raises:
        QsdError: Naming the file and the place in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        place = str(error).replace("<unicode string>", str(path))
        raise QsdError(f"configuration {path} is no YAML: {' '.join(place.split())[:300]}.") from error
    if not isinstance(content, yaml.MappingNode):
        raise QsdError(f"configuration {path} has no sections, such as model: and data:.")
    if _entries(path, content, {}) > _MOST_ENTRIES:
        raise QsdError(f"configuration {path} stands for more than {_MOST_ENTRIES} entries, by references.")
    return text


def _entries(path: Path, node: yaml.Node, known: dict[int, int]) -> int:
    """The number of entries that a section stands for, if no name in it stands twice and it does not hold itself.

    Args:
        path: The file, for messages.
        node: The section.
        known: The numbers of sections that were counted before, to which several names may refer.
    """
    if id(node) not in known and isinstance(node, yaml.CollectionNode):
        known[id(node)], entries, names = 0, 1, set()
        for entry in node.value:
            key, value = entry if isinstance(node, yaml.MappingNode) else (None, entry)
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in names:
                    raise QsdError(f"configuration {path} names {key.value!r} twice, again in line {line}; join them.")
                names.add(key.value)
            entries += _entries(path, value, known)
        known[id(node)] = entries
    if known.setdefault(id(node), 1) == 0:
        raise QsdError(f"configuration {path} has a section that holds itself, in line {node.start_mark.line + 1}.")
    return known[id(node)]


def with_found_configurations(words: Sequence[str]) -> list[str]:
    """Replace the value of each ``--config`` among the arguments by the path of the file.

    Args:
        words: The arguments of a command line.

    Raises:
        QsdError: If a configuration does not exist, or is none.
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
    if "\n" in value or value.lstrip().startswith("{"):  # jsonargparse also takes a configuration as text
        return value
    path = find_configuration(value)
    if path.is_file():  # A pipe can be read once.
        read_configuration(path)  # which refuses a wrong one with its name, as the parser does not
    return str(path)
