"""Tensors as memory: their order, blocks that stay in the cache, a buffer that is warm, and bits that are compared."""

import functools
import math
import threading

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

# Elements of a block for each thread of the processor, up to half as many again.
BLOCK = 2**18
# The memory of `scratch` on a processor, one buffer for each thread that computes.
_warm = threading.local()


def scratch(numel: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory for values ``[numel]`` that are read before the next call.

    On a processor it is the same for all calls of a thread. The first write to a page of fresh memory takes several
    times as long as decoding its values, and a layer's backward pass needs the values of one operand at a time. The
    buffer is as long as the longest operand.

    Args:
        numel: Number of values.
        dtype: Their type.
        like: A tensor on the device.
    """
    if not like.is_cpu or isinstance(like, FakeTensor):
        return torch.empty(numel, dtype=dtype, device=like.device)
    size = numel * dtype.itemsize
    buffer: Tensor | None = getattr(_warm, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _warm.buffer = torch.empty(size, dtype=torch.uint8)
    return buffer[:size].view(dtype)


@functools.lru_cache(1024)
def block_length(count: int, size: int) -> int:
    """The length of the blocks of a tensor, which are nearly equal, so that none is a small rest.

    It is a multiple of eight, so that blocks can be read eight bytes at a time.

    Args:
        count: Elements of the tensor.
        size: Elements of a block, approximately.
    """
    return max(8, math.ceil(count / max(1, round(count / size)) / 8) * 8)


def images_of_block(x: Tensor) -> int:
    """The number of images that stay in the cache of a processor; all of them on other devices.

    Args:
        x: ``[B, ...]``.
    """
    if not x.is_cpu or not x.numel():
        return max(1, len(x))
    return max(1, block_length(x.numel(), BLOCK * torch.get_num_threads()) * len(x) // x.numel())


def same_bits_(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the same shape are equal, bit by bit if they have the same strides.

    Args:
        a: Dense tensor, not empty, which is overwritten.
        b: Any tensor.
    """
    if a.stride() != b.stride():
        return torch.equal(a, b)
    a, b = flat(a), flat(b)
    size = a.element_size()
    wide, narrow = integers(size, len(a) * size % 8 == 0 and b.storage_offset() * size % 8 == 0)
    lowest, highest = torch.aminmax(a.view(wide).bitwise_xor_(b.view(wide)).view(narrow))
    return lowest.item() == highest.item() == 0


@functools.cache
def integers(size: int, eight: bool) -> tuple[torch.dtype, torch.dtype]:
    """The integers to compare floats as, and those to find a difference among.

    Where two floats differ, the bits of "one or the other" are not all zero. `torch.equal` takes one and a half times
    as long.

    Args:
        size: Bytes of a float.
        eight: Whether the floats can be read eight bytes at a time.
    """
    one = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return (torch.int64, torch.int32) if eight else (one, one)


def dense(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A tensor, or its copy with the given strides if it has others.

    Args:
        x: Any tensor.
        stride: Strides of a dense tensor of that shape.
    """
    return x if x.stride() == stride else x.new_empty_strided(x.shape, stride).copy_(x)


def is_dense(x: Tensor) -> bool:
    """Whether the memory of images ``[B, C, H, W]`` has no gaps and is contiguous or channels-last.

    Args:
        x: Any tensor.
    """
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def flat(x: Tensor) -> Tensor:
    """A dense tensor in the order of its memory, ``[numel]``.

    Args:
        x: Dense tensor.
    """
    return x.as_strided((x.numel(),), (1,))
