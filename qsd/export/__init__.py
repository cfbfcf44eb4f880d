"""Converted networks for other programs: ONNX files, in floats or in integers, and NIR graphs."""

from qsd.export.formats import FORMATS, ExportOptions, Format, find_format
from qsd.export.nir import to_nir
from qsd.export.notes import read_note, write_note
from qsd.export.onnx import to_onnx

__all__ = ["FORMATS", "ExportOptions", "Format", "find_format", "read_note", "to_nir", "to_onnx", "write_note"]
