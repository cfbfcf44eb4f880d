"""Typed contents of the files that the package writes and reads back.

Each kind of file has its schema beside its writer: a class derived from `Schema`, with a version. What is read from a
file is checked against it before anything is built from it, and a field that does not fit is one line of a `QsdError`.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qsd.errors import QsdError

# Bounds that no sensible network reaches. A file beyond them is damaged or malicious, and would exhaust the memory.
LARGEST_SIZE = 2**31 - 1
LONGEST_TIME = 2**12

Size = Annotated[int, Field(ge=0, le=LARGEST_SIZE)]
TimeSteps = Annotated[int, Field(ge=1, le=LONGEST_TIME)]
Delay = Annotated[int, Field(ge=0, le=LONGEST_TIME)]
Share = Annotated[float, Field(ge=0, le=1)]


class Schema(BaseModel):
    """Base of all schemas: exact types, no unknown fields, no changes after the check, no NaN or infinity."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True, protected_namespaces=()
    )


_Checked = TypeVar("_Checked", bound=BaseModel)


def parse_json(schema: type[_Checked], text: str | bytes, source: str, remedy: str) -> _Checked:
    """Check the JSON text of a file against a schema.

    Args:
        schema: What the text must be.
        text: The JSON text.
        source: Name of the file, or of its part, for the message.
        remedy: How the user mends a file that does not fit, a sentence without full stop.

    Raises:
        QsdError: Naming the source and the first field that does not fit.
    """
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        raise QsdError(describe(error, source, remedy)) from error


def parse(schema: type[_Checked], content: Mapping[str, Any], source: str, remedy: str) -> _Checked:
    """Check plain data, as they come from JSON or from a checkpoint, against a schema.

    Args:
        schema: What the data must be.
        content: The data.
        source: Name of the file, or of its part, for the message.
        remedy: How the user mends a file that does not fit, a sentence without full stop.

    Raises:
        QsdError: Naming the source and the first field that does not fit.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise QsdError(describe(error, source, remedy)) from error


def read_object(text: str | bytes, source: str, remedy: str) -> dict[str, Any]:
    """Parse JSON text that must be an object, before its version is known.

    Args:
        text: The JSON text.
        source: Name of the file, or of its part, for the message.
        remedy: How the user mends a file that is no JSON, a sentence without full stop.

    Raises:
        QsdError: If the text is no JSON object, or is nested too deeply.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QsdError(f"{source} is no JSON or is cut off; {remedy}.") from error
    if not isinstance(content, dict):
        raise QsdError(f"{source} holds a JSON {type(content).__name__} instead of an object; {remedy}.")
    return content


def check_version(content: Mapping[str, Any], newest: int, source: str) -> None:
    """Refuse a file of a later version, before its fields are checked.

    Args:
        content: Content of the file.
        newest: Newest version that this package reads.
        source: Name of the file, for the message.

    Raises:
        QsdError: If the version is newer.
    """
    version = content.get("version")
    if isinstance(version, int) and version > newest:
        raise QsdError(f"{source} has version {version} of the format; this qsd reads {newest}: update it.")


def describe(error: ValidationError, source: str, remedy: str) -> str:
    """One line for the first of the errors that pydantic found.

    Args:
        error: What pydantic raised.
        source: Name of the file, or of its part.
        remedy: How the user mends it, a sentence without full stop.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"])) or "the content"
    problem = _cut(" ".join(first["msg"].split()).rstrip("."), 200)  # Pydantic repeats some values, however long.
    problem = problem[:1].lower() + problem[1:]
    value = "" if first["type"] in ("missing", "json_invalid") else f" (found {_shortened(first['input'])})"
    others = error.error_count() - 1
    more = f", and {others} more" if others else ""
    return f"{source} does not fit at {field}: {problem}{value}{more}; {remedy}."


def _shortened(value: Any) -> str:
    text = " ".join(repr(value).split()) if not isinstance(value, Mapping | list | tuple) else type(value).__name__
    return _cut(text, 40)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
