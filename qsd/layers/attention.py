"""Quantized spike-driven self-attention of QSD-Transformer (Q-SDSA) and of CSDformer (NReLU), and their float twins."""

import math
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from qsd.errors import QsdError
from qsd.layers.chains import LinearChain, rep_conv
from qsd.layers.quantized import QuantConv2d
from qsd.lean import cast, exact_matmul
from qsd.neurons import NeuronKind, build_neuron

AttentionKind = Literal["linear", "softmax"]
ScoreKind = Literal["nrelu", "softmax"]


class SpikeProduct(nn.Module):
    """Product ``left @ right`` of two tensors of spike counts, exact and never in half precision.

    In float32 integers are exact below 2**24. Half precision would round the sums, and exact ties at a threshold, which
    are common in products of counts, would be decided differently. In the converted network both operands are binary in
    every time step.
    """

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """``[..., I, C]`` and ``[..., C, J]`` to ``[..., I, J]``."""
        return exact_matmul(left, right)


class MatrixProduct(nn.Module):
    """Product ``matrix @ spikes`` of an integer matrix, such as ``k^T v``, and spike counts; exact.

    The matrix is itself a product of spike counts. In the converted network the spikes wait until it is complete, and
    then add its columns: a product in every time step would multiply integers by integers.
    """

    def forward(self, matrix: Tensor, spikes: Tensor) -> Tensor:
        """``[..., I, C]`` and ``[..., C, J]`` to ``[..., I, J]``."""
        return exact_matmul(matrix, spikes)


class CountAttention(nn.Module):
    """Self-attention on spike counts without a softmax, ``neuron(q (k^T v))``: linear in the number of tokens.

    A subclass sets ``num_heads``, ``neuron``, the projections ``q_proj``, ``k_proj`` and ``v_proj``, the neurons
    ``q_neuron``, ``k_neuron``, ``v_neuron`` (of amplitude 1) and ``attn_neuron``, whose threshold takes the scale of
    the product, the products ``key_value`` (`SpikeProduct`) and ``query`` (`MatrixProduct`), and ``proj``. Values may
    have other channels than queries and keys.

    Distillation, analysis and conversion read the inputs (membranes) and outputs (counts) of four named modules:
    ``q_neuron``, ``k_neuron``, ``v_neuron`` (``[B, C, H, W]``, head-major channels) and ``attn_neuron`` (the product,
    in the shape of the values). A forward hook on them sees both.

    Attributes:
        product_scale: Factor of the product in a float twin, whose attention neuron has no threshold; else ``None``.
    """

    num_heads: int
    product_scale: float | None = None
    neuron: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    q_neuron: nn.Module
    k_neuron: nn.Module
    v_neuron: nn.Module
    attn_neuron: nn.Module
    key_value: nn.Module
    query: nn.Module
    proj: nn.Module

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``q (k^T v)`` with the channels in front of the tokens, ``[B, heads, d, N]`` each."""
        product = self.query(self.key_value(value, _transposed(key)), query)
        return product if self.product_scale is None else product * self.product_scale

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream ``[B, C, H, W]`` to the branch that is added to it, in the same shape."""
        spikes = self.neuron(x)
        query = _by_head(self.q_neuron(self.q_proj(spikes)), self.num_heads)
        key = _by_head(self.k_neuron(self.k_proj(spikes)), self.num_heads)
        value = _by_head(self.v_neuron(self.v_proj(spikes)), self.num_heads)
        product = self.mix(query, key, value)
        # Named, because a batch of no images does not tell them. (Asking for its length would fix that of ONNX files.)
        product = product.reshape(x.shape[0], product.shape[1] * product.shape[2], *x.shape[2:])
        return self.proj(cast(self.attn_neuron(product), spikes.dtype))


class SpikeDrivenSelfAttention(CountAttention):
    """Self-attention of QSD-Transformer, see `CountAttention`.

    Query, key and value are integer counts ``0..T``; their product ``I`` is an integer, and the attention neuron fires
    ``clip(floor(I / (4 T^2) + 1/2), 0, T)`` spikes of amplitude ``2 / T`` (QSD-Transformer's published code, written
    on integers).

    The float twin (``time_steps=None``) has a ReLU in the place of each neuron. ``attention="softmax"`` turns that twin
    into an ordinary softmax attention without neurons on query, key and value, a stronger teacher.

    Args:
        dim: Channels C.
        num_heads: Number of heads; must divide ``dim``.
        time_steps: T, or ``None`` for the float twin.
        weight_bits: 2 to 8, or ``None`` for float weights.
        attention: ``"linear"``, or ``"softmax"`` (float twin only).
        layer_scale: Initial scale of the branch by channel, or ``None`` for none.

    Raises:
        QsdError: If the heads do not divide the channels, or a spiking network is to have softmax attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        time_steps: int | None = 4,
        weight_bits: int | None = 4,
        attention: AttentionKind = "linear",
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if attention not in ("linear", "softmax"):
            raise QsdError(f"attention={attention!r} is unknown; use 'linear' or 'softmax'.")
        if attention == "softmax" and time_steps is not None:
            raise QsdError("attention='softmax' is not spike-driven; use it with a float twin (time_steps=None).")
        self.num_heads = num_heads
        self.softmax = attention == "softmax"
        self.neuron = build_neuron(time_steps)
        self.q_proj, self.k_proj, self.v_proj = (rep_conv(dim, weight_bits) for _ in range(3))
        steps = time_steps or 1

        def tap(threshold: float | None, amplitude: float) -> nn.Module:
            return nn.Identity() if self.softmax else build_neuron(time_steps, threshold, amplitude)

        self.q_neuron, self.k_neuron, self.v_neuron = (tap(None, 1.0) for _ in range(3))
        self.key_value, self.query = SpikeProduct(), MatrixProduct()
        self.attn_neuron = tap(4.0 * steps**2, 2.0 / steps)
        # Between its thresholds the spiking attention has the slope 1/2 of the product of the values; the float
        # twin, which has no amplitudes, gets it here.
        self.product_scale = 0.5 if time_steps is None else None
        self.proj = rep_conv(dim, weight_bits, layer_scale)

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not self.softmax:
            return super().mix(query, key, value)
        by_token = _transposed(query), _transposed(key), _transposed(value)
        return _transposed(F.scaled_dot_product_attention(*by_token))


class NReluSelfAttention(nn.Module):
    """CSDformer's self-attention: ``neuron(neuron(q k^T / sqrt(d_h)) / N v)``, with ReLUs over N for the softmax.

    (Equations 6, 7 and 11.) Query, key, value and scores are integer counts ``0..T``. Both products are computed on
    integers. The value of their unit, with ``1 / sqrt(d_h)`` and ``1 / N`` in it, goes into the threshold of the next
    neuron, which so depends on the number N of tokens. Any grid of tokens is legal.

    Distillation, analysis and conversion read the inputs (membranes) and outputs (counts) of ``q_neuron``,
    ``k_neuron``, ``v_neuron`` and ``attn_neuron`` (``[B, C, H, W]``, head-major channels) and ``score_neuron``
    (``[B, heads, N, N]``, query by key); the products come in as integers, beside their scale.

    The float twin (``time_steps=None``) has a ReLU in the place of each neuron; ``attention="softmax"`` makes an
    ordinary softmax attention of that twin.

    Args:
        dim: Channels C.
        num_heads: Number of heads; must divide ``dim``.
        time_steps: T, or ``None`` for the float twin.
        weight_bits: 2 to 8, or ``None`` for float weights.
        neurons: ``"lsq"`` or ``"qcfs"``, see `qsd.neurons.build_neuron`.
        attention: ``"nrelu"``, or ``"softmax"`` (float twin only).

    Raises:
        QsdError: If the heads do not divide the channels, or a spiking network is to have softmax attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        time_steps: int | None = 4,
        weight_bits: int | None = None,
        neurons: NeuronKind = "lsq",
        attention: ScoreKind = "nrelu",
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if attention not in ("nrelu", "softmax"):
            raise QsdError(f"attention={attention!r} is unknown; use 'nrelu' or 'softmax'.")
        if attention == "softmax" and time_steps is not None:
            raise QsdError("attention='softmax' is not spike-driven; use it with a float twin (time_steps=None).")
        if neurons == "fixed":
            raise QsdError("this attention needs learned steps; use neurons='lsq' or 'qcfs'.")
        self.num_heads = num_heads
        self.softmax = attention == "softmax"

        def projection(bias: bool) -> LinearChain:
            conv = QuantConv2d(dim, dim, 1, bias=bias, weight_bits=weight_bits)
            return LinearChain(conv=conv, norm=nn.BatchNorm2d(dim))

        def tap(amplitude: float | None) -> Any:
            return nn.Identity() if self.softmax else build_neuron(time_steps, amplitude=amplitude, kind=neurons)

        self.neuron = build_neuron(time_steps, kind=neurons)
        self.q_proj, self.k_proj, self.v_proj = (projection(bias=False) for _ in range(3))
        self.q_neuron, self.k_neuron, self.v_neuron = (tap(1.0) for _ in range(3))
        self.score_product = SpikeProduct()
        self.score_neuron = tap(1.0)
        self.value_product = SpikeProduct()
        self.attn_neuron = tap(None)
        self.proj = projection(bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream ``[B, C, H, W]`` to the branch that is added to it, in the same shape."""
        _, channels, height, width = x.shape
        tokens, head_channels = height * width, channels // self.num_heads
        spikes = self.neuron(x)
        query = _by_head(self.q_neuron(self.q_proj(spikes)), self.num_heads)
        key = _by_head(self.k_neuron(self.k_proj(spikes)), self.num_heads)
        value = _by_head(self.v_neuron(self.v_proj(spikes)), self.num_heads)
        if self.softmax:
            by_token = _transposed(query), _transposed(key), _transposed(value)
            mixed = _transposed(F.scaled_dot_product_attention(*by_token))
            return self.proj(self.attn_neuron(mixed.reshape(x.shape)))
        features = channels * tokens
        scale = self.q_neuron.step_size(features) * self.k_neuron.step_size(features) / math.sqrt(head_channels)
        scores = self.score_neuron(self.score_product(_transposed(query), key), scale)
        mixed = self.value_product(value, _transposed(scores))
        scale = self.score_neuron.step_size(self.num_heads * tokens**2) * self.v_neuron.step_size(features) / tokens
        mixed = self.attn_neuron(mixed.reshape(x.shape), scale)
        return self.proj(cast(mixed, spikes.dtype))


def _by_head(x: Tensor, heads: int) -> Tensor:
    """``[B, heads * d, H, W]`` to ``[B, heads, d, N]``."""
    return x.reshape(x.shape[0], heads, x.shape[1] // heads, x.shape[2:].numel())


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def check_heads(dim: int, num_heads: int) -> None:
    """Refuse heads that do not divide the channels.

    Args:
        dim: Channels.
        num_heads: Number of heads.

    Raises:
        QsdError: If they do not.
    """
    if num_heads < 1 or dim % num_heads:
        raise QsdError(f"{dim} channels are not divisible by num_heads={num_heads}; pick a multiple of the heads.")
