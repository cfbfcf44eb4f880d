"""Every way of spoiling one field of JSON data: left out, of another type, unknown, or enlarged beyond sense."""

import copy
import json

from qsd import QsdError

# Subtrees that hold the user's own facts, in which everything is allowed.
FREE = ("notes",)


def paths(content, free=FREE):
    """Paths of all fields and entries, outermost first; of lists only the first entry."""
    found = []
    entries = list(content.items()) if isinstance(content, dict) else list(enumerate(content))[:1]
    for key, value in entries:
        found.append((key,))
        if isinstance(value, dict | list) and key not in free:
            found += [(key, *path) for path in paths(value, free)]
    return found


def value_at(content, path):
    for key in path:
        content = content[key]
    return content


def changed(content, path, value):
    """A copy with another value at a path."""
    content = copy.deepcopy(content)
    value_at(content, path[:-1])[path[-1]] = value
    return content


def without(content, path):
    """A copy without the value at a path."""
    content = copy.deepcopy(content)
    del value_at(content, path[:-1])[path[-1]]
    return content


def enlarged(content, path):
    """A copy with an absurdly large number, or a very deep list, at a path."""
    value = value_at(content, path)
    return changed(content, path, 10**30 if isinstance(value, int | float) else json.loads("[" * 500 + "]" * 500))


def retyped(value):
    """Values of other types than the given one has."""
    others = ["word", [], {}, 1.5, -1, None, True, ["word"], {"word": "word"}]
    return [other for other in others if type(other) is not type(value) and not (value is None and other == [])]


def problem(read, content):
    """The one line by which a reader refuses some content, or ``None`` if it takes it."""
    try:
        read(content)
    except QsdError as error:
        message = str(error)
        if "\n" in message or len(message) > 500:
            raise AssertionError(f"not one line: {message}") from error
        return message
    return None
