"""The way to the programs: through PyTorch's operators where something has to see them, else straight to the device."""

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from qsd.kernels.switch import CLASSES

P = ParamSpec("P")
R = TypeVar("R")

# Places of a program: elements, or bytes of codes.
BLOCK = 1024

_direct = threading.local()


def grid(places: int, block: int = BLOCK) -> tuple[int]:
    """The programs of a launch.

    Args:
        places: Number of places.
        block: Places of a program.
    """
    return (-(-places // block),)


def wrap_triton(program: Any) -> Any:
    """A program for use in an `operator`: as PyTorch's compiler sees it, or itself where it is launched at once.

    Args:
        program: A program of Triton.
    """
    return program if getattr(_direct, "on", False) else torch.library.wrap_triton(program)


def operator(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function that launches programs as an operator of PyTorch, which ordinary calls go around.

    ``torch.compile``, modes that watch operators, and tensors without values see the operator. An ordinary call runs
    the function: a call through PyTorch's registry takes several times as long as the launch of a program.

    Args:
        name: Name of the operator, ``"qsd::..."``.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        registered: Any = torch.library.triton_op(name, mutates_args=())(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or type(args[0]) not in CLASSES or torch._C._len_torch_dispatch_stack():
                result: R = registered(*args, **kwargs)
                return result
            _direct.on = True
            try:
                return function(*args, **kwargs)
            finally:
                _direct.on = False

        return call

    return register
