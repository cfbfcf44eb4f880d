"""Weight quantization with learned step sizes (LSQ)."""

import torch
from torch import Tensor, nn

from qsd.collapse import expect_steps, watch_step
from qsd.errors import QsdError
from qsd.lsq import lsq_quantize


class StepSizeQuantizer(nn.Module):
    """Signed LSQ quantizer with one learned step size per output channel.

    The step exists and has its value when the constructor of the layer returns: averaging, distributed training and
    strict loading rely on it.

    Args:
        bits: 2 to 8; integers are in ``[-2**(bits-1), 2**(bits-1) - 1]``, without zero point.
        out_channels: Number of steps.

    Raises:
        QsdError: If ``bits`` is out of range.
    """

    def __init__(self, bits: int, out_channels: int) -> None:
        super().__init__()
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise QsdError(f"weight_bits={bits!r} is not a whole number from 2 to 8; use 0 for float weights.")
        self.bits = bits
        self.q_min, self.q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.step = nn.Parameter(torch.ones(out_channels))
        self.seen = -1  # version of the steps that were last looked at
        expect_steps()

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """Set every step to ``2 * mean|W| / sqrt(q_max)``, the mean taken over the whole tensor.

        The published code of QSD-Transformer does so, although its steps are per channel. A tensor of zeros, which
        any grid represents, gets steps of one.
        """
        if weight.is_meta:
            return  # a skeleton has no values, and computing without them is slow
        self.step.copy_(self.initial_step(weight))

    @torch.no_grad()
    def initial_step(self, weight: Tensor) -> Tensor:
        """The steps that `initialize` sets, ``[C_out]``."""
        mean = weight.abs().mean()
        step = torch.where(mean > 0, 2 * mean / self.q_max**0.5, torch.ones_like(mean))
        return step.to(self.step).expand_as(self.step).clone()

    def forward(self, weight: Tensor) -> Tensor:
        """Quantized weights, in the shape ``[C_out, ...]`` of ``weight``."""
        watch_step(self, self.step)
        return lsq_quantize(weight, self.step, self.q_min, self.q_max)

    @torch.no_grad()
    def integers(self, weight: Tensor) -> Tensor:
        """The integers on the grid, int8 ``[C_out, ...]``."""
        step = self.step.view(-1, *[1] * (weight.dim() - 1))
        return (weight / step).round_().clamp_(self.q_min, self.q_max).to(torch.int8)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, out_channels={self.step.numel()}"
