"""The schema of the settings that a task stores in its checkpoints."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, create_model

from qsd.errors import QsdError
from qsd.schema import parse

# Entries that Lightning adds: the task's class, and what its command line was given.
_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
_ADDED = ("_class_path", "_instantiator")


def check_hyper_parameters(task: type, settings: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint whose stored settings do not fit the arguments of its task.

    The schema is the constructor's signature: a setting that is missing takes its default there.

    Args:
        task: Class of the task.
        settings: The checkpoint's ``hyper_parameters``.
        path: The checkpoint, for the message.

    Raises:
        QsdError: Naming the first setting that does not fit.
    """
    parameters = list(inspect.signature(task).parameters.values())
    fields: dict[str, Any] = {p.name: (p.annotation, p.default) for p in parameters}
    # A subclass of the task has settings of its own.
    own = str(settings.get("_class_path", task.__name__)).rpartition(".")[2] == task.__name__
    config = ConfigDict(strict=True, extra="forbid" if own else "ignore", protected_namespaces=())
    schema = create_model("HyperParameters", __config__=config, **fields)
    content = {name: value for name, value in settings.items() if name not in _ADDED}
    if settings.get("_instantiator", _INSTANTIATOR) != _INSTANTIATOR:
        raise QsdError(f"checkpoint {path} names another program to build its task with; it cannot be used.")
    parse(schema, content, f"hyper_parameters of checkpoint {path}", "the checkpoint is damaged or of another package")
