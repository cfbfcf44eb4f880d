"""Triton programs of two batch norms in a row, see `qsd.lean.norms`, in float32."""

import triton
import triton.language as tl

from qsd.kernels.programs import single


# fmt: off
@triton.jit
def merge(g1, g2, var, weight, inverse, spread, size, e1, e2, correction, BLOCK: tl.constexpr):
# fmt: on
    """The weight of both norms as one, the second norm's inverse deviation, and the variance between them."""
    e1, e2 = single(e1), single(e2)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < size
    first = tl.load(g1 + channel, mask=mask, other=0.0)
    v = tl.load(var + channel, mask=mask, other=0.0)
    between = first * first * tl.div_rn(v, v + e1)
    over = tl.div_rn(1.0, tl.sqrt_rn(between + e2))
    tl.store(weight + channel, first * tl.load(g2 + channel, mask=mask, other=0.0) * over, mask=mask)
    tl.store(inverse + channel, over, mask=mask)
    tl.store(spread + channel, between * single(correction), mask=mask)


# fmt: off
@triton.jit
def merge_backward(
    weight_grad, weight, g1, g2, mean, var, inverse, slope, shift, g1_grad, g2_grad, size, e1, e2, values,
    BLOCK: tl.constexpr,
):
# fmt: on
    """The gradients of both weights, and the part of the input's gradient that comes by the way of the variance."""
    e1 = single(e1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < size
    g = tl.load(weight_grad + channel, mask=mask, other=0.0)
    first = tl.load(g1 + channel, mask=mask, other=0.0)
    over = tl.load(inverse + channel, mask=mask, other=0.0)
    room = tl.load(var + channel, mask=mask, other=1.0) + e1
    factor = tl.load(weight + channel, mask=mask, other=0.0) * over * over * first * first
    by_value = tl.div_rn(-g * factor * e1, room * room * single(values))
    tl.store(slope + channel, by_value, mask=mask)
    tl.store(shift + channel, by_value * tl.load(mean + channel, mask=mask, other=0.0), mask=mask)
    second = tl.load(g2 + channel, mask=mask, other=0.0)
    tl.store(g1_grad + channel, g * second * over * over * over * single(e2), mask=mask)
    tl.store(g2_grad + channel, g * first * over, mask=mask)


# fmt: off
@triton.jit
def add_by_channel(grad, x, slope, shift, out, size, inner, channels, BLOCK: tl.constexpr):
# fmt: on
    """A gradient, plus the input times a factor of its channel, less a constant of its channel."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    channel = place // inner % channels
    value = tl.load(x + place, mask=mask, other=0.0) * tl.load(slope + channel, mask=mask, other=0.0)
    value = tl.load(grad + place, mask=mask, other=0.0) + value - tl.load(shift + channel, mask=mask, other=0.0)
    tl.store(out + place, value, mask=mask)
