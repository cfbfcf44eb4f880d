"""Names of neurons and of their calls, and choices by name."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

Delay = int | Mapping[str, int] | None
DelayChoice = Callable[[str, int], int]


def matches(call: str, patterns: Iterable[str]) -> bool:
    """Whether any name or glob matches a call; the name of a layer matches all of its calls.

    Args:
        call: Name of the call, as `call_names` makes it.
        patterns: Names and globs.
    """
    name = call.partition("@")[0]
    return any(fnmatchcase(name, pattern) or fnmatchcase(call, pattern) for pattern in patterns)


def call_names(names: Sequence[str]) -> list[str]:
    """Name the calls of layers: a layer that runs once keeps its name, the calls of others are numbered.

    A head that is shared by the levels of a pyramid runs once per level: ``name@0``, ``name@1``, ...

    Args:
        names: Names of the layers, in the order of their calls.
    """
    total, seen = Counter(names), Counter[str]()
    found = []
    for name in names:
        found.append(f"{name}@{seen[name]}" if total[name] > 1 else name)
        seen[name] += 1
    return found


def delay_choice(delay: Delay) -> DelayChoice:
    """Turn a delay argument into a function from a neuron's name and its stored delay to its delay.

    Args:
        delay: Time steps by which neurons wait after their input begins: one number for all, numbers by name or glob
            (the last match counts), or ``None`` for the stored delays.
    """
    if delay is None:
        return lambda _name, stored: stored
    if isinstance(delay, int):
        return lambda _name, _stored: delay
    patterns = list(delay.items())

    def choose(name: str, stored: int) -> int:
        return next((steps for pattern, steps in reversed(patterns) if fnmatchcase(name, pattern)), stored)

    return choose
