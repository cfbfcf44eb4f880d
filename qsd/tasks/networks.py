"""The network of a task: its name, and how it is built."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm

from qsd.errors import QsdError

# Folders and repositories of the hub, whose configuration names the network.
_SOURCES = ("local-dir:", "hf-hub:")


def check_name(model: str) -> None:
    """Refuse a name that timm does not know.

    Args:
        model: Name of a network, perhaps with a tag, or ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.

    Raises:
        QsdError: With the nearest names.
    """
    if not model.startswith(_SOURCES) and not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3, cutoff=0.5)
        raise QsdError(f"model {model!r} is unknown to timm; nearest names: {', '.join(near) or 'none'}.")


def build_network(name: str, arguments: Mapping[str, Any], num_classes: int) -> tuple[Any, dict[str, Any]]:
    """Build a network.

    Args:
        name: Its name, see `check_name`.
        arguments: Its arguments.
        num_classes: Outputs of the classifier.

    Returns:
        The network, and ``model`` and ``model_args`` by which it can be built again without its weights: a tag, a
        folder or the hub may be gone by then.

    Raises:
        QsdError: If it cannot be built.
    """
    with blaming(f"model {name!r} with model_args={dict(arguments)}"):
        network: Any = timm.create_model(name, num_classes=num_classes, **arguments)
    registered = getattr(network, "registered", None)
    if registered is None:
        if name.startswith(_SOURCES):
            raise QsdError(f"{name} is no network of qsd, so that its checkpoints could not be read; name its model.")
        return network, {"model": name, "model_args": dict(arguments)}
    if registered["name"] == name and not arguments.get("pretrained"):
        return network, {"model": name, "model_args": dict(arguments)}
    stored = {key: value for key, value in registered["arguments"].items() if key != "num_classes"}
    return network, {"model": registered["name"], "model_args": stored}


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turn the error of a library about an argument into one line that names the argument.

    Args:
        what: The part that is built, with its arguments.
    """
    try:
        yield
    except QsdError:
        raise
    except Exception as error:  # Such as timm's, of a file that it cannot find or unpickle.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QsdError(f"{what} cannot be built: {reason[:300]}") from error
