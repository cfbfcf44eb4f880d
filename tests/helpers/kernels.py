"""Triton's interpreter for the kernels, in the process of the tests, and the bytes that operators move."""

import importlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MODULES = ("triton.language", "triton.language.core", "triton.language.standard", "triton.language.math")
_NAMES = ("programs", "neurons", "norm_programs", "norms", "weight_programs", "weights")
OURS = tuple(f"qsd.kernels.{name}" for name in _NAMES)


def interpreted(monkeypatch):
    """Replace compiled functions of Triton's language and of the kernels by interpreted ones until the test ends."""
    pytest.importorskip("triton", minversion="3.8")  # the interpreter of 3.6 fails at loops
    from triton.experimental import gluon  # noqa: F401  asks for compiled functions when it is imported
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for module in map(importlib.import_module, MODULES + OURS):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(value.fn))


def through_two_norms(function, x):
    """Output, running statistics and gradients of a function of images and two norms, on their device, in their type.

    The epsilons are large, so that no part of the gradients is negligible.
    """
    generator = torch.Generator().manual_seed(6)
    norms = [nn.BatchNorm2d(x.shape[1], eps=eps) for eps in (0.3, 0.2)]
    for norm in norms:
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        norm.to(x.device, x.dtype)
    leaf = x.detach().requires_grad_()
    output = function(leaf, *norms)
    leaves = [leaf, *norms[0].parameters(), *norms[1].parameters()]
    statistics = norms[1].running_mean, norms[1].running_var
    return [output.detach(), *statistics, *torch.autograd.grad(output.exp().sum(), leaves)]


def assert_no_further(found, others, exact):
    """Each tensor is as close to the exact one as another computation of float32 is."""
    for a, b, c in zip(found, others, exact):
        assert a.stride() == b.stride()
        error, bound = ((t.cpu().double() - c).abs().max() for t in (a, b))
        assert error <= 1.2 * bound + 2e-7 * c.abs().max()


def _bytes(values):
    return sum(
        t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, torch.Tensor) and t.numel() > 1
    )


class Traffic(TorchDispatchMode):
    """Adds up the bytes of the inputs and outputs of each operator; views and fresh memory move none."""

    moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and "empty" not in func._schema.name and "detach" not in func._schema.name:
            written = [a.name for a in func._schema.arguments if a.is_out]
            overwritten = args[1:] if func._schema.name == "aten::copy_" else args
            read = [overwritten, [v for k, v in kwargs.items() if k not in written]]
            self.moved += _bytes(read) + _bytes(result)
        return result


def moved_bytes(function):
    """The bytes that the operators of a function move."""
    with Traffic() as traffic:
        function()
    return traffic.moved
