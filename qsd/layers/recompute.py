"""Gradient checkpointing that leaves batch-norm statistics alone the second time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch norms alone, although batches are normalised by their own.

    Args:
        module: Any module.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            # A momentum of zero keeps the running statistics, from which the frame of `BatchNormPad2d` is computed,
            # while the batch's own statistics still normalise.
            norm.momentum = 0.0
            norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, saved):
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def recompute(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` that keeps only ``x`` for the backward pass and computes the rest again there.

    The gradients equal those without recomputation, bit for bit, and so do the running statistics: the second
    forward pass does not update them.

    Args:
        module: A block, ``[B, C, H, W]`` to ``[B, C, H, W]``.
        x: Input of the block.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), frozen_statistics(module)

    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)
