"""Converted networks for other programs: ONNX files, in floats or in integers."""

from qsd.export.onnx_file import to_onnx

__all__ = ["to_onnx"]
