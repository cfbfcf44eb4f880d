"""Fused kernels in Triton behind the functions of neurons, codes of counts and weight quantizers.

Each kernel computes what `qsd.functional`, `qsd.lsq` or `qsd.lean.codes` compute with several of PyTorch's operators,
and reads and writes each tensor once. PyTorch's operators are the definition: results of the kernels have the same bits
as theirs on a processor. `qsd.kernels.programs`, `qsd.kernels.norm_programs` and `qsd.kernels.weight_programs` have the
programs, `qsd.kernels.neurons`, `qsd.kernels.norms` and `qsd.kernels.weights` the operators that launch them. All of
these import Triton, and are imported by the functions that use them when `qsd.kernels.switch` says so.

The programs were tested in Triton's interpreter and on an H100, those of `qsd.kernels.norm_programs` and the sum for a
step in `qsd.kernels.programs.pass_learned` in the interpreter alone.
"""

from qsd.kernels.switch import set_kernels

__all__ = ["set_kernels"]
