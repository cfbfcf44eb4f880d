"""The settings in a checkpoint of mmengine: their schema, and the configuration's text read without executing it."""

import ast
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.utils import import_modules_from_strings
from pydantic import BaseModel, ConfigDict

from qsd.errors import QsdError
from qsd.schema import parse

_REMEDY = "the checkpoint is damaged, or not of a training with mmdet or mmseg"


class CheckpointMeta(BaseModel):
    """The entries of a checkpoint's ``meta`` that are used; mmengine writes more of them.

    Attributes:
        cfg: Text of the training's configuration.
        dataset_meta: Names of the classes, as mmengine's data sets give them.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    cfg: str
    dataset_meta: dict[str, Any]


def read_meta(content: Any, path: str | Path) -> CheckpointMeta:
    """Check what a checkpoint says about its training.

    Args:
        content: Content of the checkpoint.
        path: The file, for the message.

    Raises:
        QsdError: If it is no checkpoint of mmengine, or a field does not fit.
    """
    meta = content.get("meta") if isinstance(content, dict) else None
    if not isinstance(meta, dict) or "cfg" not in meta or not isinstance(content.get("state_dict"), dict):
        raise QsdError(f"{path} is no checkpoint of a training with mmdet or mmseg.")
    return parse(CheckpointMeta, meta, f"meta of checkpoint {path}", _REMEDY)


def read_config(text: str, source: str) -> Config:
    """The configuration that `Config.pretty_text` wrote, read as data: nothing in it is executed.

    Modules that it names under ``custom_imports`` are imported, as mmengine does, so that its types are registered.

    Args:
        text: Assignments of literals, lists and calls of ``dict``.
        source: Where it comes from, for the message.

    Raises:
        QsdError: If the text is something else.
    """
    try:
        values = {_name(statement): _value(statement.value) for statement in ast.parse(text).body}  # type: ignore[attr-defined]
    except (SyntaxError, ValueError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        raise QsdError(f"the configuration in {source} is no list of plain settings; {_REMEDY}.") from error
    config = Config(values)
    if config.get("custom_imports"):
        import_modules_from_strings(**config.custom_imports)
    return config


def _name(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    raise ValueError("no assignment")


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _call(node, node.func.id)
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): _value(value) for key, value in zip(node.keys, node.values) if key is not None}
    if isinstance(node, ast.List):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(element) for element in node.elts)
    if isinstance(node, ast.Set):
        return {_value(element) for element in node.elts}
    return ast.literal_eval(node)


def _call(node: ast.Call, function: str) -> Any:
    if function == "dict" and not node.args:
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if function in ("float", "set", "tuple") and len(node.args) <= 1 and not node.keywords:
        return {"float": float, "set": set, "tuple": tuple}[function](*map(_value, node.args))
    raise ValueError(f"a call of {function}")
