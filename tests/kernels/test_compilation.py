"""The programs compile for CUDA devices, with the instructions that decide counts, and PyTorch's compiler sees them."""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode

from qsd.kernels import switch
from qsd.layers import QuantConv2d
from qsd.neurons import LsqNeuron, SpikeNeuron
from tests.helpers import long

NEURON = {"size": "i32", "low": "i32", "columns": "i32"}
NEURON |= {"codes": "*u8", "bad": "*i32", "differs": "*i32", "sums": "*fp32"}
NEURON |= {"inner": "i32", "channels": "i32", "values": "i32"}


def instructions(program, kind, pointers, constants, number="fp32"):
    """The instructions of a program for compute capability 9.0, with numbers of a type as arguments."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: NEURON.get(name, number) for name in program.arg_names}
    signature |= dict.fromkeys(pointers, f"*{kind}") | dict.fromkeys(constants, "constexpr")
    return compiled(ASTSource(program, signature, constants), target=GPUTarget("cuda", 90, 32)).asm["ptx"]


@long
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_programs_divide_correctly_rounded_and_contract_nothing(kind, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from qsd.kernels import norm_programs, programs, weight_programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    form = {"KIND": kind, "BLOCK": 1024}
    neuron = form | {"BITS": 4, "CHECK": True, "AMPLITUDE_IS_TENSOR": False}
    for divide in (False, True):
        constants = neuron | {"DIVIDE": divide, "HALF_EVEN": False, "FACTOR_IS_TENSOR": False}
        code = instructions(programs.fire, kind, ["x", "out"], constants)
        assert ("div.rn.f32" in code) == divide
        assert "fma" not in code
        assert "div.full" not in code
        # PyTorch's compiler hands numbers on with 64 bits; the arithmetic is that of 32 bits all the same.
        wide = instructions(programs.fire, kind, ["x", "out"], constants, "fp64")
        assert not any(f"{operation}.f64" in wide for operation in ("mul", "div.rn", "add", "min", "setp.lt"))
    instructions(programs.decode, kind, ["out"], neuron | {"OUT": kind})
    instructions(programs.compare, kind, ["x"], neuron | {"OUT": kind})
    passing = form | {"BITS": 8, "CHECK": True, "SELECT": False, "DIVIDE": True, "SUM": True}
    assert "div.rn.f32" in instructions(programs.pass_codes, kind, ["grad", "out"], passing)
    for is_step in (False, True):
        learned = form | {"AMPLITUDE_IS_TENSOR": False, "IS_STEP": is_step}
        code = instructions(programs.pass_learned, kind, ["x", "grad", "out", "threshold"], learned)
        assert "div.full" not in code
    code = instructions(weight_programs.quantize, kind, ["weight", "step", "out"], form | {"OUT": kind})
    assert "div.rn.f32" in code
    assert "fma" not in code
    code = instructions(weight_programs.quantize_backward, kind, ["grad", "weight", "step", "out", "step_grad"], form)
    assert "div.rn.f32" in code
    for program in (norm_programs.merge, norm_programs.merge_backward):
        pointers = program.arg_names[: program.arg_names.index("size")]
        code = instructions(program, "fp32", pointers, {"BLOCK": 128})
        assert "div.rn.f32" in code
        assert "div.full" not in code
    instructions(norm_programs.add_by_channel, "fp32", ["grad", "x", "slope", "shift", "out"], {"BLOCK": 1024})


@pytest.fixture
def compiled(monkeypatch):
    """Compile functions of tensors without values on a CUDA device; no graph may break, and none runs."""
    pytest.importorskip("triton")
    monkeypatch.setattr(switch, "devices", frozenset(["cuda"]))
    torch._dynamo.reset()

    def compile(function, inputs, lowered):
        graphs = []

        def backend(graph, _inputs):
            graphs.append(graph)
            return graph.forward

        torch.compile(function, backend=aot_autograd(fw_compiler=backend) if lowered else backend, fullgraph=True)(
            *inputs
        )
        (whole,) = graphs
        parts = [part.graph for part in whole.modules() if isinstance(part, torch.fx.GraphModule)]
        return [node for part in parts for node in part.nodes if node.op == "call_function"]

    with FakeTensorMode():
        yield compile
    torch._dynamo.reset()


def test_compiled_training_calls_the_operators_of_kernels_in_both_passes(compiled):
    model = nn.Sequential(SpikeNeuron(4), QuantConv2d(3, 4, 1), LsqNeuron(4)).train()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="cuda"))
    nodes = compiled(model, [torch.empty(2, 3, 4, 4, device="cuda", requires_grad=True)], lowered=False)
    operators = sorted(str(node.target) for node in nodes if str(node.target).startswith("qsd."))
    forward, backward = ["fire", "fire", "quantize"], ["pass_codes", "pass_learned", "quantize_backward"]
    assert operators == sorted(f"qsd.{name}.default" for name in forward + backward)


@torch.no_grad()
def test_the_compiler_sees_the_programs_of_all_operators(compiled):
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    from qsd.kernels import neurons, norms, weights

    def every(x, weight, step, threshold):
        output, codes, bad = neurons.fire(x, 4, None, threshold, (0, 4), bits=4, check=True)
        decoded = neurons.decode(codes, x.numel(), 4, threshold, torch.float32, torch.bfloat16, bad)
        differs = neurons.difference(codes, output, 4, threshold, torch.float32, bad)
        passed = neurons.pass_fixed(codes, output, 4, 4, None, 0.25, bad)
        learned = neurons.pass_learned(x, output, threshold, threshold, 4)
        quantized = weights.quantize(weight, step, -8, 7, torch.bfloat16)
        merged = norms.merge(step, step, step, 1e-5, 1e-5, 32)
        slope, shift, *_ = norms.merge_backward(step, merged[0], step, step, step, step, merged[1], 1e-5, 1e-5, 32)
        return (
            norms.add_by_channel(x, x, slope[:3], shift[:3]),
            output,
            bad,
            decoded,
            differs,
            passed,
            learned,
            quantized,
            weights.quantize_backward(weight, weight, step, -8, 7),
        )

    shapes = (2, 3, 4, 4), (4, 3, 1, 1), (4,), ()
    nodes = compiled(every, [torch.empty(shape, device="cuda") for shape in shapes], lowered=True)
    programs = [kernel_side_table.get_kernel(n.kwargs["kernel_idx"]) for n in nodes if "kernel_idx" in n.kwargs]
    assert sorted(program.fn.__name__ for program in programs) == [
        "add_by_channel",
        "compare",
        "decode",
        "fire",
        "merge",
        "merge_backward",
        "pass_codes",
        "pass_learned",
        "quantize",
        "quantize_backward",
    ]
