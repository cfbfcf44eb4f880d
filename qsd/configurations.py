"""The configurations that come with the package, found as ``configs/NAME`` from any folder."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml

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


def check_configuration(path: Path) -> None:
    """Refuse a file that is no configuration in YAML, and names that stand twice, of which the parser takes the last.

    Args:
        path: The file.

    Raises:
        QsdError: Naming the file and the place in it.
    """
    try:
        content = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if not isinstance(content, yaml.MappingNode):
            raise QsdError(f"configuration {path} has no sections, such as model: and data:.")
        _check_names(path, content)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        place = str(error).replace("<unicode string>", str(path))
        raise QsdError(f"configuration {path} is no YAML: {' '.join(place.split())[:300]}.") from error


def _check_names(path: Path, node: yaml.Node) -> None:
    """Look for names that stand twice, in all sections."""
    children = list(node.value) if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        names = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in names:
                line = key.start_mark.line + 1
                raise QsdError(f"configuration {path} names {key.value!r} twice, again in line {line}; join the two.")
            names.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
            children.append(value)
    for child in children:
        _check_names(path, child)


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
    check_configuration(path)
    return str(path)
