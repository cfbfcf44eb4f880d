r"""The training neuron: one step, integer spike counts.

A neuron of threshold :math:`\theta` maps its accumulated input :math:`z` to

.. math:: n = \mathrm{clip}(\lfloor z / \theta + 1/2 \rfloor, 0, T), \qquad y = n \cdot a

with :math:`T` time steps and spike amplitude :math:`a`. At inference a delayed integrate-and-fire neuron with that
threshold fires exactly these :math:`n` binary spikes. QSD-Transformer's IE-LIF (ICLR 2025) is the case of the fixed
threshold :math:`\theta = a = 1/T`; CSDformer's activation (2025) that of a learned step :math:`\theta = a = s`.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qsd import functional, lean
from qsd.collapse import expect_steps, watch_step
from qsd.errors import QsdError
from qsd.functional import CountRule, fixed_drive, scale_gradient, spike_count
from qsd.lean import Choice
from qsd.operands import noting
from qsd.recurrence import FrameMemory, frame_slack, membrane_potentials

# The name of a kind of neuron, see `register_neuron`.
NeuronKind = str
# One number, or a tensor without dimensions that gradients flow through.
Factor = float | Tensor
# Counts of inputs that lie exactly between two counts, and the window in which the gradient passes.
Rounding = Literal["half_up", "half_even"]
Window = Literal["open", "closed"]


def _check_time_steps(time_steps: int) -> None:
    if isinstance(time_steps, bool) or not isinstance(time_steps, int) or not 1 <= time_steps <= 255:
        raise QsdError(f"time_steps={time_steps!r} is not a whole number from 1 to 255.")


class SpikeNeuron(nn.Module):
    """Integer spike counts over a window of ``time_steps``, times an amplitude (IE-LIF by default).

    It has no state and needs no reset call. `qsd.set_lean` chooses how little it keeps for the backward pass.

    With a `memory` it gets all frames of its recordings in one call, ``[F * B, ...]``, and the remainder of a frame
    lives on in the next one (`qsd.recurrence`). The remainder of the last frame is dropped before the call returns.

    Attributes:
        memory: Number of frames and decay of the remainder; ``None`` for a neuron of images.

    Args:
        time_steps: T, the most spikes per window, 1 to 255. T = 1 is a binary neuron.
        threshold: Accumulated input for each spike, in units of the input; ``None`` means ``1 / T``.
        amplitude: Contribution of a spike to the output; ``None`` means the threshold.
        rounding: Count of an input that lies exactly between two counts: ``"half_up"`` the larger one,
            ``"half_even"`` the even one. Conversion is exact for both: to round to even counts, the spikes 1, 3, ...
            of a neuron need more than the threshold, and the spikes 2, 4, ... at least the threshold.
        window: Inputs at which the gradient passes: ``"open"`` strictly between zero and T thresholds, ``"closed"``
            at both ends too. ``None`` takes the window that was published with the rounding: open with halves up,
            closed with halves to even.

    Raises:
        QsdError: If ``time_steps`` is out of range, the threshold is not positive, or an option is unknown.
    """

    lean: Choice = "auto"
    integer_operands: bool = False
    memory: FrameMemory | None = None

    def __init__(
        self,
        time_steps: int = 4,
        threshold: float | None = None,
        amplitude: float | None = None,
        rounding: Rounding = "half_up",
        window: Window | None = None,
    ) -> None:
        super().__init__()
        _check_time_steps(time_steps)
        if threshold is not None and not threshold > 0:
            raise QsdError(f"threshold={threshold} is not positive.")
        if rounding not in get_args(Rounding):
            raise QsdError(f"rounding={rounding!r} is unknown; use 'half_up' or 'half_even'.")
        if window is not None and window not in get_args(Window):
            raise QsdError(f"window={window!r} is unknown; use 'open' or 'closed'.")
        self.time_steps = time_steps
        self._threshold, self._amplitude = threshold, amplitude
        half_even = rounding == "half_even"
        self.rule = CountRule(half_even, half_even if window is None else window == "closed")

    @property
    def threshold(self) -> float:
        """Accumulated input for each spike, in units of the input."""
        return 1 / self.time_steps if self._threshold is None else self._threshold

    @property
    def amplitude(self) -> float:
        """Contribution of a spike to the output."""
        return self.threshold if self._amplitude is None else self._amplitude

    def drive(self, x: Tensor) -> Tensor:
        """Input in units of the threshold, see `qsd.functional.fixed_drive`."""
        return fixed_drive(x, self.time_steps, self._threshold)

    def potential(self, x: Tensor, *scale: Any) -> Tensor:
        """Membrane potential before the spikes, in units of the threshold: the drive, plus what earlier frames left.

        Args:
            x: Accumulated input ``[B, ...]``, or of all frames ``[F * B, ...]``.
            scale: Value of a unit of the input, for neurons that take one.
        """
        drive = self.drive(x, *scale)
        if self.memory is None:
            return drive
        return membrane_potentials(drive, self.time_steps, self.memory, self._rule(x))

    def _rule(self, x: Tensor) -> CountRule:
        """The rule with the slack for ties of an input."""
        return self.rule._replace(slack=frame_slack(x, self.time_steps, self._threshold, self.memory))

    def counts(self, x: Tensor) -> Tensor:
        """Spike counts ``0..T`` for the accumulated input ``x``, in its shape and dtype."""
        return spike_count(self.potential(x), self.time_steps, self._rule(x))

    def forward(self, x: Tensor) -> Tensor:
        """Spike counts times the amplitude, in the shape of the accumulated input ``x``."""
        package = lean if lean.trains_lean(self.lean, x) else functional
        spikes = (noting(package, x) if self.integer_operands else package).fixed_spikes
        amplitude = self.threshold if self._amplitude is None else self._amplitude
        if self.memory is not None:  # The potential is in units of the threshold.
            return spikes(self.potential(x), self.time_steps, 1.0, amplitude, self._rule(x))
        return spikes(x, self.time_steps, self._threshold, amplitude, self.rule)

    def extra_repr(self) -> str:
        options = ", rounding='half_even'" if self.rule.half_even else ""
        options += "" if self.memory is None else f", frames={self.memory.frames}, decay={self.memory.decay:g}"
        return f"time_steps={self.time_steps}, threshold={self.threshold:g}, amplitude={self.amplitude:g}{options}"


class LearnedStepNeuron(SpikeNeuron):
    """A spike neuron whose threshold is a learned step; subclasses own the parameter.

    The step exists and has a value when the constructor returns. All parameters of the class are step sizes.

    A neuron behind a product of spikes receives the product of their counts, an integer, and the value of one unit of
    that integer (``scale``). Its threshold absorbs the scale: ``step / scale``, in units of counts. So ties are decided
    on integers, as binary spikes decide them.

    Args:
        time_steps: T, 1 to 255.
        amplitude: ``None`` for the step; 1 for bare counts, as operands of a product.

    Raises:
        QsdError: If ``time_steps`` is out of range.
    """

    def __init__(self, time_steps: int = 4, amplitude: float | None = None) -> None:
        super().__init__(time_steps, amplitude=amplitude)
        expect_steps()

    def step_size(self, features: int) -> Tensor:
        """The step size as a tensor without dimensions that receives gradients.

        Args:
            features: Number of neurons in the layer, for one image.
        """
        raise NotImplementedError

    def change_time_steps(self, time_steps: int) -> None:
        """Give the window another length and keep the largest output: ``step * T`` stays.

        The values between zero and the largest output change. The result is another network, which has to be trained
        or at least measured anew.

        Args:
            time_steps: T, 1 to 255.

        Raises:
            QsdError: If it is out of range.
        """
        _check_time_steps(time_steps)
        self.time_steps = time_steps

    @property
    def threshold(self) -> float:
        """The step size as a number, in units of the input (or of the scaled product)."""
        return float(self.step_size(1).detach())

    def _watched_step(self, x: Tensor) -> Tensor:
        for step in self._parameters.values():
            if step is not None:
                watch_step(self, step)
        return self.step_size(x.shape[1:].numel())

    def drive(self, x: Tensor, scale: Factor | None = None) -> Tensor:
        """Input in units of the threshold.

        Args:
            x: Accumulated input ``[B, ...]``.
            scale: Value of a unit of the input, if that is a product of counts.
        """
        return x / self._watched_step(x) if scale is None else x / (self._watched_step(x) / scale)

    def counts(self, x: Tensor, scale: Factor | None = None) -> Tensor:
        """Spike counts ``0..T``.

        Args:
            x: Accumulated input ``[B, ...]``.
            scale: Value of a unit of the input, if that is a product of counts.
        """
        return self._spikes(x, scale, bare=True)

    def _spikes(self, x: Tensor, scale: Factor | None, bare: bool) -> Tensor:
        package = lean if lean.trains_lean(self.lean, x) else functional
        spikes = (noting(package, x) if self.integer_operands else package).learned_spikes
        step = self._watched_step(x)
        if self.memory is not None:  # The potential is in units of the threshold.
            return spikes(self.potential(x, scale), x.new_ones(()), None if bare else step, self.time_steps)
        return spikes(x, step if scale is None else step / scale, None if bare else step, self.time_steps)

    def forward(self, x: Tensor, scale: Factor | None = None) -> Tensor:
        """Spike counts times the amplitude, in the shape of the accumulated input ``[B, ...]``."""
        if self._amplitude is not None:
            counts = self.counts(x, scale)
            return counts if self._amplitude == 1 else counts * self._amplitude
        return self._spikes(x, scale, bare=False)

    def extra_repr(self) -> str:
        options = "" if self.memory is None else f", frames={self.memory.frames}, decay={self.memory.decay:g}"
        return f"time_steps={self.time_steps}, amplitude={self._amplitude or 'step'}{options}"


class LsqNeuron(LearnedStepNeuron):
    """The step learned by LSQ, CSDformer's choice: its gradient has the factor ``1 / sqrt(features * T)``.

    Its initial value is that of `initialize` for a standard normal input. `qsd.initialize_neurons` sets it from data.
    """

    def __init__(self, time_steps: int = 4, amplitude: float | None = None) -> None:
        super().__init__(time_steps, amplitude)
        self.step = nn.Parameter(torch.tensor(2 * math.sqrt(2 / math.pi) / math.sqrt(time_steps)))

    def step_size(self, features: int) -> Tensor:
        return scale_gradient(self.step, (features * self.time_steps) ** -0.5)

    @torch.no_grad()
    def change_time_steps(self, time_steps: int) -> None:
        before = self.time_steps
        super().change_time_steps(time_steps)
        self.step.mul_(before / time_steps)

    @torch.no_grad()
    def initialize(self, x: Tensor, scale: Factor | None = None) -> None:
        """Set the step to ``2 * mean|x| / sqrt(T)`` of a batch's input; nothing but zeros leaves it as it is.

        Args:
            x: Accumulated input ``[B, ...]``.
            scale: Value of a unit of the input, if that is a product of counts.
        """
        mean = x.abs().mean(dtype=self.step.dtype)
        mean = mean if scale is None else mean * scale
        self.step.copy_(torch.where(mean > 0, 2 * mean / math.sqrt(self.time_steps), self.step))


class QcfsNeuron(LearnedStepNeuron):
    """The step as QCFS parametrises it (Bu et al., ICLR 2022): ``ceiling / T``, with a learned ceiling.

    The ceiling starts at 8, whatever the data, and its gradient is QCFS's own, without LSQ's factor. CSDformer's
    authors report that it does not converge.
    """

    def __init__(self, time_steps: int = 4, amplitude: float | None = None) -> None:
        super().__init__(time_steps, amplitude)
        self.ceiling = nn.Parameter(torch.tensor(8.0))

    def step_size(self, features: int) -> Tensor:
        del features
        return self.ceiling / self.time_steps


class FloatNeuron(nn.ReLU):
    """The ReLU of a float twin in a neuron's place; it accepts a scale, as `LearnedStepNeuron` does."""

    def step_size(self, features: int) -> float:
        """One: values stand for themselves."""
        del features
        return 1.0

    def forward(self, x: Tensor, scale: Factor | None = None) -> Tensor:
        """``[B, ...]`` to the same shape."""
        return super().forward(x if scale is None else x * scale)


# A neuron's constructor: T, the fixed threshold and the amplitude, the latter two ``None`` for its own choice.
NeuronFactory = Callable[[int, float | None, float | None], nn.Module]
# The neurons of a layer: a registered kind, or their constructor.
Neurons = NeuronKind | NeuronFactory
_NEURONS: dict[str, NeuronFactory] = {
    "fixed": SpikeNeuron,
    "lsq": lambda time_steps, _threshold, amplitude: LsqNeuron(time_steps, amplitude),
    "qcfs": lambda time_steps, _threshold, amplitude: QcfsNeuron(time_steps, amplitude),
}


def register_neuron(kind: str, factory: NeuronFactory) -> None:
    """Give a kind of neuron a name, so that models can be built with it (``neurons="..."``).

    Args:
        kind: Name of the kind.
        factory: Called with T, the fixed threshold and the amplitude; the latter two are ``None`` where the model
            leaves them to the neuron. It returns a `SpikeNeuron`, or a `LearnedStepNeuron` for models that need one.

    Raises:
        QsdError: If the name is taken.
    """
    if kind in _NEURONS:
        raise QsdError(f"A kind of neuron named {kind!r} is registered already; choose another name.")
    _NEURONS[kind] = factory


def neuron_kinds() -> tuple[str, ...]:
    """The names that `build_neuron` knows."""
    return tuple(_NEURONS)


def build_neuron(
    time_steps: int | None,
    threshold: float | None = None,
    amplitude: float | None = None,
    kind: Neurons = "fixed",
) -> Any:
    """The neuron of a spiking network, or its float twin's ReLU if ``time_steps`` is ``None``.

    Args:
        time_steps: T, or ``None`` for a ReLU.
        threshold: Fixed threshold, see `SpikeNeuron`; a ReLU or a learned step has none.
        amplitude: Contribution of a spike to the output, see `SpikeNeuron`; a ReLU has none.
        kind: ``"fixed"`` threshold, or a learned one: ``"lsq"``, ``"qcfs"``, or a name given to `register_neuron`; or
            a constructor, which gets the other arguments.

    Raises:
        QsdError: For a kind that is not registered.
    """
    if not isinstance(kind, str):
        return FloatNeuron() if time_steps is None else kind(time_steps, threshold, amplitude)
    if kind not in _NEURONS:
        *others, last = (repr(name) for name in _NEURONS)
        raise QsdError(f"neurons {kind!r} are unknown; use {', '.join(others)} or {last}.")
    return FloatNeuron() if time_steps is None else _NEURONS[kind](time_steps, threshold, amplitude)
