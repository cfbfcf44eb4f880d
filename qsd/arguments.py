"""Wrong arguments of Lightning's command line, and of its configurations, told in one line.

jsonargparse lists every type that it tried for an option, in many lines. The line that is made of them here names the
option as it is typed, its value, and the values that fit.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

from qsd.program import one_line, parser_message

_LONGEST_VALUE = 80
# The words of jsonargparse 4.53, and those of 4.39.
_REJECTED = re.compile(r"(?:^Option|does not accept (?:option|nested key)) '([\w.]+)'|Key '([\w.]+)' is not expected")
_MISSING = re.compile(r"arguments are required: ([\w.]+)|Key \"([\w.]+)\" is required")
# In the order in which they are told.
_KINDS = {
    r"<class 'int'>": "a whole number",
    r"<class 'float'>": "a number",
    r"<class 'bool'>": "true, false",
    r"<class 'str'>": "a text",
    r"<class '(list|tuple|collections\.abc\.\w+)'>|\b(list|tuple|Sequence|Iterable)\[": "a list in brackets",
    r"<class 'dict'>|\b(dict|Mapping)\[": "pairs such as {name: 1}",
}


def argument_message(message: str, options: Collection[str], classes: Mapping[str, Iterable[type]]) -> str:
    """The message of jsonargparse in one line.

    Args:
        message: The message.
        options: The known options.
        classes: By the key of an option, the classes that it may name.
    """
    outer = re.search(r'key "([^"]+)"', message)
    if outer is None:
        if missing := _MISSING.search(message):
            section, _, name = (missing[1] or missing[2]).rpartition(".")
            if f"--{name}" in options:  # else it is no option, such as the checkpoint of qsd convert
                return f"--{name} is missing{'; give it, or --config FILE' if section else ''}."
        if rejected := _REJECTED.search(message):
            message = f"unrecognized arguments: --{rejected[1] or rejected[2]}"
        return parser_message(message, options)
    name = f"--{outer[1]}"
    # The parser of a class has told this mistake already, by the option's name within the class.
    if inner := re.search(r"^\s*- ((unrecognized arguments: )?--\w[^\n]*)$", message, re.MULTILINE):
        return re.sub(r"--(?=\w)", f"{name}.", inner[1])
    if problem := class_problem(message):
        word, reason = problem
        kinds = [kind.__name__ for kind in classes.get(outer[1], ())]
        near = difflib.get_close_matches(word.rpartition(".")[2], kinds, n=1, cutoff=0.5)
        return f"{name}={word} {reason}{f'; did you mean {near[0]}?' if near else '.'}"
    if other := re.search(r"does not correspond to a subclass of (\w+)", message):
        return f"{name} names a class that is no {other[1]}."
    if file := re.search(r"Unable to load config '([^'\n]*)'", message):
        return f"{name}={file[1]} is no file of settings."
    return _wrong_value(name, message[outer.end() :]) or one_line(message)


def class_problem(message: str) -> tuple[str, str] | None:
    """The class that jsonargparse cannot find or build, and why, if that is what a message tells.

    Args:
        message: The message.
    """
    if unknown := re.search(r"dot import path string: ([^\n]+)", message):
        return unknown[1], "names no class"
    if problem := re.search(r"given class_path '([^'\n]+)':\s*([^\n]+)", message):
        return problem[1], f"cannot be used: {one_line(problem[2]).removesuffix('.')}"
    return None


def _wrong_value(name: str, text: str) -> str | None:
    """The line about a value of a wrong type; ``None`` if the text names no type that is known here.

    Args:
        name: The option.
        text: The types that were tried, and the value behind them.
    """
    tried, _, value = text.rpartition("value: ")
    union = re.search(r"Subtypes: ([^\n]*)", tried)
    tried = union[1] if union else tried
    if re.search(r"<class '(?!\w+')(?!collections)", tried):
        return None
    kinds = [words for pattern, words in _KINDS.items() if re.search(pattern, tried)]
    kinds += [choice for choices in re.findall(r"Literal\[([^\]]*)\]", tried) for choice in choices.split(", ")]
    kinds += ["null"] * ("NoneType" in tried)
    if not kinds:
        return None
    value = one_line(value)
    value = value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]} ..."
    fitting = " or ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
    return f"{name}={value} does not fit; give {fitting}."
