"""Reading ONNX files, which could otherwise name further files to open."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qsd.errors import QsdError
from qsd.reading.files import FileError, describe, regular_file

_DOMAINS = ("", "ai.onnx")  # whose operators are mathematics; others may name files or libraries
# The one operator of ONNX Runtime's own that `qsd.export` writes: a product of matrices, with its scale.
_RUNTIME_OPERATORS = {("com.microsoft", "MatMulIntegerToFloat")}


def read_onnx(path: str | Path, noun: str = "file") -> tuple[bytes, dict[str, str]]:
    """Read an ONNX file that is complete in itself.

    Args:
        path: Path of the file.
        noun: Name of the file's role in messages.

    Returns:
        The model, for ``onnxruntime.InferenceSession``, and its metadata by key.

    Raises:
        FileError: If the file is missing, damaged, no ONNX file, keeps tensors in other files, or has operators that
            are neither ONNX's own nor written by `qsd.export`.
        QsdError: If the package onnx is missing.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise QsdError("reading ONNX files needs more packages: pip install 'qsd[export]'.") from error
    path = regular_file(path, noun)
    try:
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)
    except (DecodeError, OSError, ValueError, MemoryError) as error:
        found = describe(path)
        other = f" (it is {found})" if found and found != "an ONNX file" else ""
        raise FileError(f"{path} cannot be read: it is damaged, incomplete or no ONNX file{other}.") from error
    if not model.graph.node:
        found = describe(path)
        raise FileError(f"{path} is no ONNX file with a network in it{f' (it is {found})' if found else ''}.")
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = next((entry.value for entry in tensor.external_data if entry.key == "location"), "another file")
            raise FileError(
                f"{path} keeps its tensor {tensor.name!r} in {place!r}; only files that are complete in themselves are "
                "read: write it without external data."
            )
    for node in _nodes(model):
        if node.domain not in _DOMAINS and (node.domain, node.op_type) not in _RUNTIME_OPERATORS:
            raise FileError(
                f"{path} has the operator {node.domain}.{node.op_type}; only ONNX's own and "
                "MatMulIntegerToFloat are run."
            )
    return content, {entry.key: entry.value for entry in model.metadata_props}


def _graphs(model: Any) -> Iterator[Any]:
    waiting = [model.graph, *model.functions, *(t.algorithm for t in model.training_info)]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


def _nodes(model: Any) -> Iterator[Any]:
    for graph in _graphs(model):
        yield from graph.node


def _tensors(model: Any) -> Iterator[Any]:
    for graph in _graphs(model):
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
