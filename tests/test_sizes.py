"""The limits that keep every module readable in one sitting; CONTRIBUTING.md states them."""

import ast
from pathlib import Path

import qsd

SOURCES = sorted(Path(qsd.__file__).parent.rglob("*.py"))


def test_no_module_is_longer_than_350_lines():
    lengths = {str(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > 350} == {}


def test_no_function_is_longer_than_45_lines():
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (length := node.end_lineno - node.lineno + 1) > 45:
                long[f"{path}:{node.name}"] = length
    assert long == {}
