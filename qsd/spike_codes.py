"""Spike counts in half a byte: what neurons, and the layers behind them, keep for the backward pass.

The output of a neuron is a count ``0..T`` times an amplitude. A training step would keep it as a float for the layer
that it enters, and beside it one bit per element for the neuron: whether the gradient passes. Both fit into a code of
four bits for T up to 7 (two codes to a byte), of eight for T up to 127, from which the float comes back to the bit.

A neuron leaves the codes on the tensor that it returns (`attach`); layers that know what to do with them look there
(`spikes_of`) and everybody else sees an ordinary tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# One number, or a tensor without dimensions.
Amplitude = float | Tensor
View = Callable[[Tensor], Tensor]

_ATTRIBUTE = "_qsd_spikes"
_NORM = "_qsd_norm"


@dataclass(frozen=True)
class Layout:
    """How codes become a tensor of counts again, without the tensors that takes.

    Attributes:
        bits: of a code: 4 or 8. The highest one tells whether the neuron's gradient passes.
        shape: of the counts.
        stride: of the counts, which are dense.
        dtype: of the counts.
        views: what was made of the tensor since, views and reshapes in their order.
    """

    bits: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    views: tuple[View, ...] = ()

    def counts(self, codes: Tensor) -> Tensor:
        """The counts, in fresh memory, as the neuron returned them.

        Args:
            codes: see `Spikes`.
        """
        if self.bits == 8:
            return self._dense(torch.bitwise_and(codes, 127).to(self.dtype))
        low = torch.bitwise_and(codes, 7)
        return self._halves(low, torch.bitwise_right_shift(codes, 4).bitwise_and_(7))

    def inside(self, codes: Tensor) -> Tensor:
        """1 where the neuron's gradient passes, else 0, as `counts`."""
        if self.bits == 8:
            return self._dense(torch.bitwise_right_shift(codes, 7).to(self.dtype))
        low = torch.bitwise_right_shift(codes, 3).bitwise_and_(1)
        return self._halves(low, torch.bitwise_right_shift(codes, 7))

    def _halves(self, low: Tensor, high: Tensor) -> Tensor:
        flat = torch.empty(self.shape.numel(), dtype=self.dtype, device=low.device)
        half = len(low)
        flat[:half] = low
        flat[half:] = high[: len(flat) - half]
        return self._dense(flat)

    def _dense(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Spikes:
    """What a neuron fired, in few bits.

    Attributes:
        codes: uint8, in the order of memory.
        amplitude: what a spike is worth.
        layout: how to read the codes.
        version: of the tensor that they are attached to, to notice a change in place.
    """

    codes: Tensor
    amplitude: Amplitude
    layout: Layout
    version: int = 0


def code_bits(time_steps: int) -> int:
    """Bits of a code for T, at most 127: counts, and one bit for the gradient."""
    return 4 if time_steps <= 7 else 8


def encode(counts: Tensor, flags: Tensor, bits: int) -> tuple[Tensor, Layout]:
    """Put counts, and whether the gradient passes, into codes.

    Done on floats, in the memory of the flags: conversion to bytes is slow on a CPU, and so is fresh memory.

    Args:
        counts: ``0..T``, dense.
        flags: the code's highest bit, 0 or ``2 ** (bits - 1)``, in the same order of memory. It is overwritten.
        bits: see `code_bits`.

    Returns:
        The codes and how to read them.
    """
    flat = flags.add_(counts).as_strided((flags.numel(),), (1,))
    if bits == 4:
        half = (len(flat) + 1) // 2
        low, high = flat[:half], flat[half:]
        low[: len(high)].add_(high, alpha=16)
        flat = low
    return flat.to(torch.uint8), Layout(bits, counts.shape, counts.stride(), counts.dtype)


def attach(output: Tensor, codes: Tensor, amplitude: Amplitude, layout: Layout) -> Tensor:
    """Leave the codes of a tensor on it.

    Args:
        output: counts times the amplitude.
        codes: of the counts.
        amplitude: what a spike is worth.
        layout: of the codes.

    Returns:
        ``output``.
    """
    setattr(output, _ATTRIBUTE, Spikes(codes, amplitude, layout, output._version))
    return output


def spikes_of(x: Tensor) -> Spikes | None:
    """The codes on a tensor, unless it has none, was changed since, or is being compiled.

    A compiler decides by itself what to keep and what to compute again.

    Args:
        x: any tensor.
    """
    if torch.compiler.is_compiling():
        return None
    spikes = getattr(x, _ATTRIBUTE, None)
    return spikes if isinstance(spikes, Spikes) and spikes.version == x._version else None


def viewed(x: Tensor, view: View) -> Tensor:
    """``view(x)``, with the codes on it if ``x`` has some.

    Args:
        x: any tensor.
        view: a reshape, transposition, or the like.
    """
    result, spikes = view(x), spikes_of(x)
    if spikes is None:
        return result
    return attach(result, spikes.codes, spikes.amplitude, replace(spikes.layout, views=(*spikes.layout.views, view)))


@dataclass(frozen=True)
class Kept:
    """How a saved tensor becomes an operand again.

    Attributes:
        layout: of its codes; ``None`` if it was kept as it is.
        amplitude: as a number; ``None`` if it is a tensor, saved beside the codes.
        dtype: of the operand.
    """

    layout: Layout | None
    amplitude: float | None
    dtype: torch.dtype

    @staticmethod
    def of(operand: Tensor, spikes: Spikes | None) -> tuple["Kept", Tensor, Tensor | None]:
        """How to keep an operand, and the tensors to save for it.

        Args:
            operand: as the layer computes with it.
            spikes: what it consists of.
        """
        if spikes is None:
            return Kept(None, None, operand.dtype), operand, None
        if isinstance(spikes.amplitude, Tensor):
            return Kept(spikes.layout, None, operand.dtype), spikes.codes, spikes.amplitude
        return Kept(spikes.layout, spikes.amplitude, operand.dtype), spikes.codes, None

    def operand(self, saved: Tensor, amplitude: Tensor | None) -> Tensor:
        """The operand, bit by bit.

        Args:
            saved: what `of` said to save.
            amplitude: the same.
        """
        if self.layout is None:
            return saved
        counts = self.layout.counts(saved)
        factor = self.amplitude if amplitude is None else amplitude
        if factor is not None and not (amplitude is None and factor == 1):
            counts.mul_(factor)
        for view in self.layout.views:
            counts = view(counts)
        return counts.to(self.dtype)


@dataclass(frozen=True)
class NormOrigin:
    """That a tensor is a batch norm's output, and of what: it follows from tensors that the norm keeps anyway.

    Attributes:
        tensors: the norm's input ``[B, C, H, W]``, weight, bias, batch mean and inverse deviation, ``[C]`` each.
        eps: of the norm.
        version: of the output, to notice a change in place.
    """

    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    eps: float
    version: int


def remember_norm(
    output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float
) -> Tensor:
    """Leave on a batch norm's output where it comes from.

    Args:
        output: of the norm.
        x: see `NormOrigin`, and so are the others.
        weight: see there.
        bias: see there.
        mean: see there.
        inverse: see there.
        eps: see there.

    Returns:
        ``output``.
    """
    setattr(output, _NORM, NormOrigin((x, weight, bias, mean, inverse), eps, output._version))
    return output


def norm_of(x: Tensor) -> NormOrigin | None:
    """Where a tensor comes from, if that is a batch norm and it was not changed since.

    Args:
        x: any tensor.
    """
    if torch.compiler.is_compiling():
        return None
    origin = getattr(x, _NORM, None)
    return origin if isinstance(origin, NormOrigin) and origin.version == x._version else None
