"""Reading files of unknown origin: checkpoints, safetensors, ONNX files, configurations inside checkpoints.

Every file that this package reads back goes through one of these functions. Nothing that a file says is executed, and
no file makes us open another one. Whatever is wrong is one line, a `QsdError` with the file, the fault and the remedy.
"""

from qsd.reading.archives import check_archive
from qsd.reading.files import FileError, describe, regular_file, shown
from qsd.reading.idx_files import read_idx
from qsd.reading.literals import parse_assignments
from qsd.reading.onnx_files import read_onnx
from qsd.reading.parts import part_of
from qsd.reading.tensors import check_safetensors, read_safetensors
from qsd.reading.torch_files import CodeError, read_torch

__all__ = [
    "CodeError",
    "FileError",
    "check_archive",
    "check_safetensors",
    "describe",
    "parse_assignments",
    "part_of",
    "read_idx",
    "read_onnx",
    "read_safetensors",
    "read_torch",
    "regular_file",
    "shown",
]
