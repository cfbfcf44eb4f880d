r"""The training neuron: one step, integer spike counts.

A neuron of threshold :math:`\theta` maps its accumulated input :math:`z` to

.. math:: n = \mathrm{clip}(\lfloor z / \theta + 1/2 \rfloor, 0, T), \qquad y = n \cdot a

with :math:`T` time steps and spike amplitude :math:`a`. At inference a delayed integrate-and-fire neuron with that
threshold fires exactly these :math:`n` binary spikes. QSD-Transformer's IE-LIF (ICLR 2025) is the case of the fixed
threshold :math:`\theta = a = 1/T`.
"""

from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.functional import spike_count


class SpikeNeuron(nn.Module):
    """Integer spike counts over a window of ``time_steps``, times an amplitude (IE-LIF by default).

    It has no state and needs no reset call: a sample's spikes depend on nothing but its own input.

    Args:
        time_steps: T, the most spikes per window, 1 to 255. T = 1 is a binary neuron.
        threshold: input that one spike is worth, in units of the input; ``None`` means ``1 / T``.
        amplitude: what one spike adds to the output; ``None`` means the threshold.

    Raises:
        QsdError: if ``time_steps`` is out of range or the threshold is not positive.
    """

    def __init__(self, time_steps: int = 4, threshold: float | None = None, amplitude: float | None = None) -> None:
        super().__init__()
        if isinstance(time_steps, bool) or not isinstance(time_steps, int) or not 1 <= time_steps <= 255:
            raise QsdError(f"time_steps={time_steps!r} is not a whole number from 1 to 255.")
        if threshold is not None and not threshold > 0:
            raise QsdError(f"threshold={threshold} is not positive.")
        self.time_steps = time_steps
        self.threshold = 1 / time_steps if threshold is None else threshold
        self.amplitude = self.threshold if amplitude is None else amplitude
        self._fixed_unit_range = threshold is None

    def drive(self, x: Tensor) -> Tensor:
        """Input in units of the threshold.

        ``T * x`` and ``x / (1 / T)`` differ in the last bit where 1/T is no binary fraction, and ties are decided by
        that bit; so is an integer divided by the attention's threshold, whose quotient is correctly rounded.
        """
        return x * self.time_steps if self._fixed_unit_range else x / self.threshold

    def counts(self, x: Tensor) -> Tensor:
        """Spike counts ``0..T`` for the accumulated input ``x``, in its shape and dtype."""
        return spike_count(self.drive(x), self.time_steps)

    def forward(self, x: Tensor) -> Tensor:
        """Spike counts times the amplitude, in the shape of the accumulated input ``x``."""
        counts = self.counts(x)
        return counts if self.amplitude == 1 else counts * self.amplitude

    def extra_repr(self) -> str:
        return f"time_steps={self.time_steps}, threshold={self.threshold:g}, amplitude={self.amplitude:g}"


def build_neuron(
    time_steps: int | None, threshold: float | None = None, amplitude: float | None = None
) -> SpikeNeuron | nn.ReLU:
    """The neuron of a spiking network, or its float twin's ReLU if ``time_steps`` is ``None``.

    Args:
        time_steps: see `SpikeNeuron`.
        threshold: see `SpikeNeuron`; a ReLU has none.
        amplitude: see `SpikeNeuron`; a ReLU has none.
    """
    return nn.ReLU() if time_steps is None else SpikeNeuron(time_steps, threshold, amplitude)
