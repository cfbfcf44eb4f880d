"""What a layer tells about its cost: the operations of one call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, UntypedStorage

from qsd.spiking.codes import Code
from qsd.spiking.layers.movement import UNKNOWN, Signal

# Operations of the network as it is, with each merged chain as one kernel, and of the network with all factors.
BY_NETWORK = ("merged", "unmerged")


def both(number: float) -> dict[str, float]:
    """The same number of operations, merged or not.

    Args:
        number: Number of operations.
    """
    return dict.fromkeys(BY_NETWORK, number)


def exact_sum(x: Tensor, axes: tuple[int, ...] | None = None) -> Tensor:
    """Sums of spike counts in float64.

    The second axis, of channels, is summed in the tensor's own type first, many times faster: these sums are integers
    below 2**24. Numbers of fewer bits than float32 are summed in float32.

    Args:
        x: Spike counts ``[B, ...]``.
        axes: The axes to sum over, from the first on; ``None`` for all.
    """
    axes = tuple(range(x.dim())) if axes is None else axes
    if 1 in axes and x.dim() > 2 and x.is_floating_point():
        x = x.sum(1, keepdim=True, dtype=torch.float32 if x.element_size() < 4 else None)
    return x.sum(axes, dtype=torch.float64)


class Sums:
    """Sums over a tensor, remembered as long as the tensor lives and is not changed.

    A neuron asks for the sums of its spikes, in every code, and so does each layer behind it.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[UntypedStorage, dict[tuple[object, ...], Tensor]] = WeakKeyDictionary()

    def get(self, x: Tensor, kind: str, axes: tuple[int, ...], values: Callable[[], Tensor]) -> Tensor:
        """Sums of values of a tensor, in float64.

        Args:
            x: The tensor ``[B, ...]``.
            kind: Name of the values.
            axes: The axes to sum over, from the first on.
            values: Computes the values, in the shape of the tensor.
        """
        if x.dim() > 2 and len(axes) == x.dim():
            return self.get(x, kind, (0, 1), values).sum()  # The sums by position are asked for as well.
        if x.is_inference():  # Changes of such a tensor are not counted.
            return exact_sum(values(), axes)
        known = self._known.setdefault(x.untyped_storage(), {})
        key = (kind, axes, x.shape, x.stride(), x.storage_offset(), x.dtype, x._version)
        if key not in known:
            known[key] = exact_sum(values(), axes)
        return known[key]


def _nonzero(x: Tensor) -> Tensor:
    """1 where a value is not zero, in the type of the tensor: a sum of floats is many times faster than of booleans."""
    return torch.ne(x, 0, out=torch.empty_like(x))


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of one call of a layer.

    Attributes:
        tensors: Spike counts ``[B, ...]``, or where time steps are taken binary spikes ``[steps * B, ...]``.
        code: The code whose spikes are counted.
        stepped: Whether time steps are taken.
        image: Whether the inputs are functions of images alone, which are the same in every time step.
        signals: Range and origin of each tensor.
        weight_bits: Width of the trained network's quantized weights, by name.
        merged_bits: Width of merged kernels; ``None`` for floats.
        analog: Whether the inputs are currents, neither images nor spikes.
        brief: Whether spikes and additions alone are asked for.
        sums: Sums that are known already.
    """

    tensors: tuple[Tensor, ...]
    code: Code
    stepped: bool
    image: bool
    signals: tuple[Signal, ...] = ()
    weight_bits: Mapping[str, int] = field(default_factory=dict)
    merged_bits: int | None = None
    analog: bool = False
    brief: bool = False
    sums: Sums = field(default_factory=Sums, repr=False, compare=False)

    @property
    def time_steps(self) -> int:
        """T of the network, the largest spike count."""
        return self.code.largest

    @property
    def window(self) -> int:
        """Number of time steps in which the spikes of one value come."""
        return self.code.steps

    @property
    def images(self) -> float:
        """Number of images."""
        length = len(self.tensors[0])
        return length / self.window if self.stepped and not self.image else length

    def signal(self, index: int = 0) -> Signal:
        """Range and origin of a tensor.

        Args:
            index: Position of the tensor.
        """
        return self.signals[index] if index < len(self.signals) else UNKNOWN

    def size(self, x: Tensor) -> float:
        """Number of values per image.

        Args:
            x: One of the tensors, or the output.
        """
        return float(x.shape[1:].numel())

    def counts(self, x: Tensor) -> Tensor:
        """Sums over the window, ``[B, ...]``.

        Args:
            x: One of the tensors.
        """
        return self.steps(x).sum(0) if self.stepped and not self.image else x

    def steps(self, x: Tensor) -> Tensor:
        """Spikes by time step, ``[steps, B, ...]``.

        Args:
            x: One of the tensors.
        """
        if not self.stepped:
            return self.code.digits(x)
        return x.reshape(self.window, len(x) // self.window, *x.shape[1:])

    def spikes(self, x: Tensor) -> Tensor:
        """The number of spikes by element, in the shape of the tensor; only counts have one.

        Args:
            x: One of the tensors.
        """
        return x if self.stepped or self.image else self.code.ones(x)

    def spike_sum(self, x: Tensor, axes: tuple[int, ...] | None = None) -> Tensor:
        """The number of spikes, in float64.

        Args:
            x: One of the tensors, or the output.
            axes: The axes to sum over, from the first on; ``None`` for all.
        """
        kind = "values" if self.stepped or self.image else self.code.name
        return self.sums.get(x, kind, tuple(range(x.dim())) if axes is None else axes, lambda: self.spikes(x))

    def nonzero_sum(self, x: Tensor, axes: tuple[int, ...] | None = None) -> Tensor:
        """The number of sums over the window that are not zero, in float64.

        Args:
            x: One of the tensors, or the output.
            axes: The axes to sum over, from the first on; ``None`` for all.
        """
        kind = "window" if self.stepped and not self.image else "nonzero"
        axes = tuple(range(x.dim())) if axes is None else axes
        return self.sums.get(x, kind, axes, lambda: _nonzero(self.counts(x)))

    def cells(self, x: Tensor) -> float:
        """Neurons times time steps: the most spikes that could come in.

        Args:
            x: One of the tensors.
        """
        return x.numel() if self.stepped else x.numel() * self.window


@dataclass
class Operations:
    """Operations of one call of a layer, of all images together.

    Attributes:
        spikes: Spikes that came in.
        cells: Neurons times time steps that could have fired them; their quotient is the firing rate.
        additions: Accumulates, ``merged`` and ``unmerged`` (see `both`).
        macs: Multiply-accumulates, ``merged`` and ``unmerged``, of a layer that sees images or other analog values.
        dense: Multiply-accumulates of the unmerged layer in an ordinary network, whose inputs are numbers.
        rate: Firing rate in the papers' convention, rate x T x dense operations; ``None`` for that of the spikes.
        zero_skipping: Accumulates of a product if zeros of its integer operand are skipped.
        nonzero: Inputs that are not zero: the events of a network of numbers; ``None`` for all.
        effective: Multiply-accumulates of the unmerged layer for inputs that are not zero; ``None`` for all.
        dense_merged: Multiply-accumulates of the merged layer for numbers; ``None`` for those of the unmerged one.
    """

    spikes: float = 0.0
    cells: float = 0.0
    additions: dict[str, float] = field(default_factory=lambda: both(0.0))
    macs: dict[str, float] = field(default_factory=lambda: both(0.0))
    dense: float = 0.0
    rate: float | None = None
    zero_skipping: float | None = None
    nonzero: float | None = None
    effective: float | None = None
    dense_merged: float | None = None

    @property
    def firing_rate(self) -> float:
        """The firing rate in the papers' convention."""
        if self.rate is not None:
            return self.rate
        return self.spikes / self.cells if self.cells else 0.0


def synaptic_operations(
    inputs: LayerInputs, fan_out: Callable[[str], Tensor], dense: list[float], merged: float | None = None
) -> Operations:
    """Operations of a synapse: every spike is added to as many outputs as it is connected with.

    Args:
        inputs: Inputs of the call.
        fan_out: Gets ``"merged"`` or ``"unmerged"`` and returns the number of outputs of the first linear map that each
            input is added to, in a shape that broadcasts to the input's.
        dense: Multiply-accumulates of each factor for one image.
        merged: Multiply-accumulates of the merged kernel for one image; ``None`` for the sum of the factors'.
    """
    (x,), images = inputs.tensors, inputs.images
    total = images * sum(dense)
    of_kernel = total if merged is None else images * merged
    # An image's current is the same in every time step, and computed once. Analog values are multiplied once per image,
    # on currents summed over the window.
    if inputs.image or inputs.analog:
        return Operations(macs={"merged": of_kernel, "unmerged": total}, dense=total, dense_merged=of_kernel)
    reach = {key: fan_out(key).double() for key in BY_NETWORK}
    # Summed over images and channels first, so that the fan-out is multiplied to one small map.
    axes = tuple(range(max(1, x.dim() - max(reached.dim() for reached in reach.values()))))
    spikes, nonzero = inputs.spike_sum(x, axes), inputs.nonzero_sum(x, axes)
    additions = {key: float((spikes * reached).sum()) for key, reached in reach.items()}
    # All factors but the first see analog values, once per image, on currents summed over the window.
    inner = images * sum(dense[1:])
    return Operations(
        float(spikes.sum()),
        inputs.cells(x),
        additions,
        {"merged": 0.0, "unmerged": inner},
        total,
        nonzero=float(nonzero.sum()),
        effective=float((nonzero * reach["unmerged"]).sum()) + inner,
        dense_merged=of_kernel,
    )
