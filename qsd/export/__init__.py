"""Converted networks for other programs: ONNX files, in floats or in integers, NIR graphs, folders of integers, C."""

from qsd.export.c_program import write_c
from qsd.export.formats import FORMATS, ExportOptions, Format
from qsd.export.graph import LayerCall
from qsd.export.integer_dump import read_integers, write_integers
from qsd.export.integers import IntegerGraph, writes
from qsd.export.nir import to_nir
from qsd.export.nir_graph import NirGraph, Signal, writes_nir
from qsd.export.notes import read_note, write_note
from qsd.export.onnx import to_onnx
from qsd.export.qonnx import write_qonnx

__all__ = [
    "FORMATS",
    "ExportOptions",
    "Format",
    "IntegerGraph",
    "LayerCall",
    "NirGraph",
    "Signal",
    "read_integers",
    "read_note",
    "to_nir",
    "to_onnx",
    "write_c",
    "write_integers",
    "write_note",
    "write_qonnx",
    "writes",
    "writes_nir",
]
