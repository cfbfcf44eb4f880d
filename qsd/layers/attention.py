"""Quantized spike-driven self-attention (Q-SDSA) of QSD-Transformer, and its float twins."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from qsd.errors import QsdError
from qsd.functional import linear_attention
from qsd.layers.chains import rep_conv
from qsd.neurons import build_neuron

AttentionKind = Literal["linear", "softmax"]


class SpikeDrivenSelfAttention(nn.Module):
    """Self-attention on spike counts: ``neuron(q (k^T v))``, no softmax, linear in the number of tokens.

    Query, key and value are integer counts ``0..T``; their product ``I`` is an integer, and the attention neuron fires
    ``clip(floor(I / (4 T^2) + 1/2), 0, T)`` spikes of amplitude ``2 / T`` (QSD-Transformer's published code, written
    on integers).

    The quantities that distillation, analysis and conversion look at are the inputs (membranes) and outputs (counts)
    of four named modules: ``q_neuron``, ``k_neuron``, ``v_neuron`` (``[B, C, H, W]``, head-major channels) and
    ``attn_neuron`` (the product, ``[B, C, H, W]``). A forward hook on them sees both.

    The float twin (``time_steps=None``) has a ReLU for each neuron. ``attention="softmax"`` turns that twin into an
    ordinary softmax attention without neurons on query, key and value, a stronger teacher.

    Args:
        dim: channels C.
        num_heads: heads; must divide ``dim``.
        time_steps: T, or ``None`` for the float twin.
        weight_bits: 2 to 8, or ``None`` for float weights.
        attention: ``"linear"``, or ``"softmax"`` (float twin only).

    Raises:
        QsdError: if the heads do not divide the channels, or softmax attention is asked of a spiking network.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        time_steps: int | None = 4,
        weight_bits: int | None = 4,
        attention: AttentionKind = "linear",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise QsdError(f"{dim} channels are not divisible by num_heads={num_heads}; pick a multiple of the heads.")
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
        self.attn_neuron = tap(4.0 * steps**2, 2.0 / steps)
        # Between its thresholds the spiking attention has the slope 1/2 of the product of the values; the float
        # twin, which has no amplitudes, gets it here.
        self.product_scale = 0.5 if time_steps is None else None
        self.proj = rep_conv(dim, weight_bits)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream ``[B, C, H, W]`` to the branch that is added to it, in the same shape."""
        batch, channels, height, width = x.shape
        spikes = self.neuron(x)
        heads = (batch, self.num_heads, channels // self.num_heads, height * width)
        query = self.q_neuron(self.q_proj(spikes)).reshape(heads)
        key = self.k_neuron(self.k_proj(spikes)).reshape(heads)
        value = self.v_neuron(self.v_proj(spikes)).reshape(heads)
        if self.softmax:
            tokens = (t.transpose(-1, -2) for t in (query, key, value))
            product = F.scaled_dot_product_attention(*tokens).transpose(-1, -2)
        else:
            product = linear_attention(query, key, value)
            if self.product_scale is not None:
                product = product * self.product_scale
        product = product.reshape(x.shape)
        return self.proj(self.attn_neuron(product).to(spikes.dtype))
