"""Calibration: 8-bit grids for the activations between two convolutions of a chain, from their range on images."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.export.chain_factors import hands_bias_on
from qsd.integer.weights import IntegerWeights, chain_weights, evaluated_convolutions
from qsd.precision import full_float32
from qsd.spiking import SpikingNetwork
from qsd.spiking.batches import Images, image_batches
from qsd.spiking.layers import Convolution, SpikingChain
from qsd.spiking.merging import Merge

_LARGEST_RATIO = 2.0**10  # Between the units of two channels: a channel that hardly varies needs no finer levels.
_TINY = 1e-30  # In place of a range of zero.

Ranges = dict[str, tuple[NDArray[Any], NDArray[Any]]]


@dataclass
class Grid:
    """The 8-bit levels of an inner activation, which stand for the values ``unit * (level - zero_point)``.

    Attributes:
        unit: Value of one level of every channel, ``[C]``. Unless the next convolution is depthwise, the units are
            powers of two times the smallest one, because its integers have to take up their ratios.
        zero_point: Level that stands for 0, from 0 to 255.
        depthwise: Whether the next convolution is depthwise.
    """

    unit: NDArray[Any]
    zero_point: int
    depthwise: bool

    @classmethod
    def over(cls, low: NDArray[Any], high: NDArray[Any], after: Convolution, weights: IntegerWeights) -> "Grid":
        """The finest grid that holds a range.

        Args:
            low: Least value by channel, ``[C]``, not positive.
            high: Largest value by channel, ``[C]``, not negative.
            after: The next convolution.
            weights: Its integers, which take up the ratios of the units.
        """
        levels, depthwise = weights.levels(), after.groups == len(low) == len(after.bias)
        # All channels share one level of zero; each side of it keeps at least an eighth of the levels.
        zero = round(levels * float(np.max(-low) / max(np.max(high) + np.max(-low), _TINY)))
        zero = min(max(zero, levels // 8), levels - levels // 8) if np.max(-low) > 0 else 0
        needed = np.maximum(high / (levels - zero), -low / zero if zero else 0.0)
        coarsest = max(float(needed.max()), _TINY)
        needed = np.maximum(needed, coarsest / _LARGEST_RATIO)
        if depthwise:
            return cls(needed, zero, True)
        finer = 2.0 ** np.floor(np.log2(coarsest / needed))
        return cls(coarsest / np.minimum(finer, weights.room() if after.groups == 1 else 1.0), zero, False)


@dataclass(frozen=True)
class _Inner:
    """An inner activation of a chain: the convolution that gives it, and the name of the one that takes it."""

    chain: SpikingChain
    source: Convolution
    after: str

    @property
    def handed_on(self) -> Any:
        """The part of the values that the next convolution takes over into its bias, by channel."""
        taken = hands_bias_on(self.source, evaluated_convolutions(self.chain)[self.after])
        return self.source.bias.cpu().double().numpy() if taken else 0.0


@torch.no_grad()
@full_float32()
def calibrate(spiking: SpikingNetwork, images: Images | None, round_inner: Merge = "all") -> dict[str, Grid]:
    """The grids of the inner activations, from their least and largest values on images.

    Args:
        spiking: The network.
        images: Images ``[B, C, H, W]``, or a data loader. A network without chains of several convolutions has no
            inner activations, and needs no images.
        round_inner: Chains with grids: ``"all"`` or True, ``"none"`` or False, those with a frame (``"rep"``) or those
            without (``"sep"``).

    Returns:
        Grids by the dotted names of the convolutions that give the activations.

    Raises:
        QsdError: If there are inner activations and no images.
    """
    inner = _inner_activations(spiking, round_inner)
    if not inner:
        return {}
    if images is None:
        raise QsdError("an integer file needs images to find the ranges of inner activations with; pass images=...")
    ranges: Ranges = {
        name: (np.zeros(len(place.source.bias)), np.zeros(len(place.source.bias))) for name, place in inner.items()
    }
    with _watching(inner, ranges):
        for batch, _ in image_batches(images, spiking):
            spiking(batch)
    grids = {}
    for name, place in inner.items():
        after, weights = (
            evaluated_convolutions(place.chain)[place.after],
            chain_weights(place.chain, place.after, spiking),
        )
        grids[name] = Grid.over(*ranges[name], after, weights)
    return grids


def _inner_activations(spiking: SpikingNetwork, round_inner: Merge) -> dict[str, _Inner]:
    inner: dict[str, _Inner] = {}
    for name, chain in spiking.chains().items():
        factors = evaluated_convolutions(chain)
        kind = "rep" if any(factor.frame is not None for factor in factors.values()) else "sep"
        if round_inner in (True, "all", kind):
            inner |= {f"{name}.{key}": _Inner(chain, factors[key], after) for key, after in pairwise(factors)}
    return inner


@contextmanager
def _watching(places: Mapping[str, _Inner], ranges: Ranges) -> Iterator[None]:
    """Widen the ranges by the inner activations, until the block ends."""

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            ends = output.amin((0, 2, 3)), output.amax((0, 2, 3))
            low, high = (end.cpu().double().numpy() - places[name].handed_on for end in ends)
            ranges[name] = np.minimum(ranges[name][0], low), np.maximum(ranges[name][1], high)

        return hook

    handles = [place.source.register_forward_hook(watch(name)) for name, place in places.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
