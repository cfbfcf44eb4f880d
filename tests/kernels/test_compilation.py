"""The programs compile for CUDA devices, with the instructions that decide counts."""

import pytest

from tests.helpers import long

NEURON = {"size": "i32", "low": "i32", "codes": "*u8", "bad": "*i32", "sums": "*fp32", "columns": "i32"}


def instructions(program, kind, pointers, constants):
    """The instructions of a program for compute capability 9.0."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: NEURON.get(name, "fp32") for name in program.arg_names}
    signature |= dict.fromkeys(pointers, f"*{kind}") | dict.fromkeys(constants, "constexpr")
    return compiled(ASTSource(program, signature, constants), target=GPUTarget("cuda", 90, 32)).asm["ptx"]


@long
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_programs_divide_correctly_rounded_and_contract_nothing(kind, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from qsd.kernels import programs, weight_programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    form = {"KIND": kind, "BLOCK": 1024}
    neuron = form | {"BITS": 4, "AMPLITUDE_IS_TENSOR": False}
    for divide in (False, True):
        constants = neuron | {"CHECK": True, "DIVIDE": divide, "HALF_EVEN": False, "FACTOR_IS_TENSOR": False}
        code = instructions(programs.fire, kind, ["x", "out"], constants)
        assert ("div.rn.f32" in code) == divide
        assert "fma" not in code
        assert "div.full" not in code
    instructions(programs.decode, kind, ["out"], neuron | {"OUT": kind})
    instructions(programs.compare, kind, ["x"], neuron | {"OUT": kind})
    passing = form | {"BITS": 8, "SELECT": False, "DIVIDE": True, "SUM": True}
    assert "div.rn.f32" in instructions(programs.pass_codes, kind, ["grad", "out"], passing)
    learned = form | {"AMPLITUDE_IS_TENSOR": False}
    code = instructions(programs.pass_learned, kind, ["x", "grad", "out", "threshold"], learned)
    assert "div.full" not in code
    code = instructions(weight_programs.quantize, kind, ["weight", "step", "out"], form | {"OUT": kind})
    assert "div.rn.f32" in code
    assert "fma" not in code
    code = instructions(weight_programs.quantize_backward, kind, ["grad", "weight", "step", "out", "step_grad"], form)
    assert "div.rn.f32" in code
