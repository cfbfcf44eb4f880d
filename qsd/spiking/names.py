"""Names of neurons and of their calls, and choices by name."""

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral

from qsd.errors import QsdError
from qsd.schema import LONGEST_TIME

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
    if not isinstance(delay, Mapping):
        return lambda _name, _stored: delay
    patterns = list(delay.items())

    def choose(name: str, stored: int) -> int:
        return next((steps for pattern, steps in reversed(patterns) if fnmatchcase(name, pattern)), stored)

    return choose


def check_delay(delay: Delay, names: Iterable[str]) -> None:
    """Refuse a delay that no neuron can have, and one for a neuron that does not exist.

    Args:
        delay: As in `delay_choice`.
        names: Dotted names of the neurons.

    Raises:
        QsdError: If a delay is no whole number from 0 to 4096, or if a name or glob matches no neuron.
    """
    if delay is None:
        return
    names = list(names)
    for pattern, steps in delay.items() if isinstance(delay, Mapping) else [("", delay)]:
        of = f"the delay of neuron {pattern}" if isinstance(delay, Mapping) else "the delay"
        if isinstance(steps, bool) or not isinstance(steps, Integral) or steps > LONGEST_TIME:
            raise QsdError(f"{of} is {steps!r}; use a whole number of time steps from 0 to {LONGEST_TIME}.")
        if steps < 0:
            raise QsdError(f"{of} is negative ({steps}); 0 fires at once, and T - 1 is lossless.")
    for pattern in delay if isinstance(delay, Mapping) else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1) or names[:1]
            raise QsdError(f"a delay names the neuron {pattern!r}, which does not exist; the nearest is {near[0]!r}.")


def delay_within(delay: Delay, names: Collection[str]) -> Delay:
    """The part of a delay that concerns some of a model's neurons.

    Args:
        delay: As in `delay_choice`.
        names: Dotted names of these neurons.
    """
    if not isinstance(delay, Mapping):
        return delay
    return {pattern: steps for pattern, steps in delay.items() if any(fnmatchcase(name, pattern) for name in names)}
