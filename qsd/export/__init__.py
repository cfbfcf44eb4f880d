"""Converted networks for other programs: ONNX files, in floats or in integers, and NIR graphs."""

from qsd.export.nir_file import to_nir
from qsd.export.onnx_file import to_onnx

__all__ = ["to_nir", "to_onnx"]
