"""Scripts that became subcommands of ``qsd``: each remains for one release under its old name."""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import qsd_launcher


def moved(
    name: str, command: str, renamed: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Sequence[str] | None], int]:
    """The ``main`` of a script that has moved; the script runs it when it is started.

    Args:
        name: The ``__name__`` of the script.
        command: The subcommand that replaces the script, with leading arguments.
        renamed: The new names of options that have changed.
    """

    def main(args: Sequence[str] | None = None) -> int:
        print(f"This script has moved: use qsd {command}.", file=sys.stderr)
        words = [_renamed(word, renamed) for word in (sys.argv[1:] if args is None else args)]
        return qsd_launcher.main([*command.split(), *words])

    if name == "__main__":
        sys.exit(main())
    return main


def _renamed(word: str, renamed: Mapping[str, str]) -> str:
    option, equals, value = word.partition("=")
    return f"{renamed.get(option, option)}{equals}{value}"
