"""Configurations that lie inside a file, read as data: assignments of literals, as mmengine writes them."""

import ast
from typing import Any, TypeGuard

from qsd.errors import QsdError

_DEPTH = 100  # levels of nesting; configurations of detectors have about ten
_CONSTANTS = {"inf": float("inf"), "nan": float("nan")}  # as Python writes them


def parse_assignments(text: str, source: str) -> dict[str, Any]:
    """Read ``name = value`` lines whose values are numbers, texts, lists, tuples, sets, dictionaries or ``dict(...)``.

    The text is parsed by `ast` and never executed or compiled. This is the form of ``Config.pretty_text``, in which
    mmengine stores a configuration in every checkpoint.

    Args:
        text: Python source.
        source: Origin of the text, for messages.

    Returns:
        The values by name; the last assignment of a name counts.

    Raises:
        QsdError: For a statement or value of any other kind, with its line.
    """
    if not isinstance(text, str):
        raise QsdError(f"{source} is no text, but of type {type(text).__name__}.")
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise QsdError(
            f"{source} cannot be read: {type(error).__name__}, line {getattr(error, 'lineno', '?')}."
        ) from error
    values: dict[str, Any] = {}
    for statement in module.body:
        if not isinstance(statement, ast.Assign) or not all(isinstance(name, ast.Name) for name in statement.targets):
            raise _refusal(source, statement)
        value = _literal(statement.value, source, 0)
        values.update({name.id: value for name in statement.targets if isinstance(name, ast.Name)})
    return values


def _literal(node: ast.expr, source: str, depth: int) -> Any:
    if depth > _DEPTH:
        raise QsdError(f"{source} is nested too deep, line {node.lineno}.")
    parts = [*getattr(node, "elts", ())]
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List):
        return [_literal(part, source, depth + 1) for part in parts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(part, source, depth + 1) for part in parts)
    if isinstance(node, ast.Dict):
        return _dictionary(node, source, depth)
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _literal(node.operand, source, depth + 1)
        if isinstance(value, int | float | complex) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    try:
        if isinstance(node, ast.Set):
            return {_literal(part, source, depth + 1) for part in parts}
    except TypeError as error:  # a list in a set
        raise _refusal(source, node) from error
    if _is_dict_call(node):
        return {str(word.arg): _literal(word.value, source, depth + 1) for word in node.keywords}
    raise _refusal(source, node)


def _is_dict_call(node: ast.expr) -> TypeGuard[ast.Call]:
    """Whether an expression is ``dict(name=value, ...)``."""
    if not isinstance(node, ast.Call) or node.args:
        return False
    named = isinstance(node.func, ast.Name) and node.func.id == "dict"
    return named and all(keyword.arg is not None for keyword in node.keywords)


def _dictionary(node: ast.Dict, source: str, depth: int) -> dict[Any, Any]:
    items = {}
    for key, value in zip(node.keys, node.values):
        if not isinstance(key, ast.Constant | ast.Tuple | ast.UnaryOp):  # None where another one is unpacked
            raise _refusal(source, node)
        try:
            items[_literal(key, source, depth + 1)] = _literal(value, source, depth + 1)
        except TypeError as error:  # a list in a tuple that is a key
            raise _refusal(source, node) from error
    return items


def _refusal(source: str, node: ast.AST) -> QsdError:
    try:
        shown = " ".join(ast.unparse(node).split())[:60]
    except RecursionError:
        shown = "nested too deep"
    return QsdError(
        f"{source} is refused: line {getattr(node, 'lineno', '?')} is no plain value ({shown}), and programs in files "
        "are not run."
    )
