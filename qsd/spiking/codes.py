"""Codes: the binary spikes in which a count of 0..T travels.

In the unary code a count n is n spikes, each of the value 1, in a window of T time steps. In the binary code it is its
binary digits, the most significant one first, in a window of ``ceil(log2(T + 1))`` steps: a spike of the step j is
shifted by as many places as steps follow it. Both codes are digits of one radix, 1 or 2, and everything that depends
on time asks the code: neurons, synapses, products, pools, the clock, latency and interval.

Few-spike neurons (Stoeckl and Maass, Nature Machine Intelligence 2021) fire with thresholds that fall by powers of two,
and weighted spikes (Kim et al., 2018) have the phase of a spike as its weight. The rules for residual streams,
max-pools and products are this package's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from qsd.errors import QsdError
from qsd.spiking.steps import shift

CodeName = Literal["unary", "binary"]
CODES: tuple[CodeName, ...] = get_args(CodeName)


class Code(ABC):
    """How a count travels as binary spikes.

    Steps of a window are numbered from 1.

    Attributes:
        name: Name of the code.
        radix: A digit is worth ``radix`` times the digit after it.

    Args:
        largest: T, the largest count.
        steps: Time steps of a window.
    """

    name: ClassVar[CodeName]
    radix: ClassVar[int]

    def __init__(self, largest: int, steps: int) -> None:
        self.largest, self.steps = largest, steps

    @property
    def lossless_delay(self) -> int:
        """The shortest delay at which a neuron has received all of its input before it first fires."""
        return self.steps - 1

    # -- spikes on their way to currents -------------------------------------------------------------------------------

    @abstractmethod
    def places(self, step: int) -> int:
        """Binary places by which the currents of a step's spikes are shifted; none outside of the window.

        Args:
            step: Step of the window.
        """

    @abstractmethod
    def share(self, step: int) -> float:
        """Share of a bias that is injected in a step.

        Args:
            step: Step of the window.
        """

    @abstractmethod
    def part(self, constant: Tensor, step: int) -> Tensor:
        """The part of a current that depends on no spike, such as the first layer's, that is injected in a step.

        Args:
            constant: The whole current.
            step: Step of the window.
        """

    @abstractmethod
    def spread(self, constant: Tensor) -> Tensor:
        """`part` for all steps, ``[B, ...]`` to ``[steps * B, ...]``.

        Args:
            constant: The whole current.
        """

    @abstractmethod
    def currents(self, linear_map: Callable[[Tensor, float], Tensor], spikes: Tensor) -> Tensor:
        """The currents of spikes in all steps, ``[steps * B, ...]``; their sum belongs to the count.

        Args:
            linear_map: Gets spikes and the share of its bias.
            spikes: ``[steps * B, ...]``.
        """

    @abstractmethod
    def weigh(self, currents: Tensor) -> Tensor:
        """Shift the currents of each step by its places.

        Args:
            currents: ``[steps * B, ...]``.
        """

    @property
    @abstractmethod
    def plain(self) -> "Code":
        """The code of signals of as many steps that are added up as they are: currents, and spikes with a value."""

    # -- firing --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def check_delay(self, name: str, delay: int) -> None:
        """Refuse a delay that is impossible in the code.

        Args:
            name: Name of the neuron.
            delay: Its delay.

        Raises:
            QsdError: If the neuron cannot fire so early.
        """

    @abstractmethod
    def saturate(self, membrane: Tensor, threshold: Any) -> None:
        """Bound the membrane before its first spike, in place, where the digits could tell a count above T.

        Args:
            membrane: Potential, from which the count is the number of whole thresholds.
            threshold: A number, or a tensor of the same shape.
        """

    @abstractmethod
    def excess(self, membrane: Tensor, threshold: Any) -> Tensor | None:
        """What `saturate` cuts off, which a membrane that persists to the next frame keeps; ``None`` for nothing.

        Args:
            membrane: Potential before the first spike.
            threshold: A number, or a tensor of the same shape.
        """

    @abstractmethod
    def level(self, threshold: Any, step: int) -> Any:
        """The potential at which a neuron fires in a step of its firing window, and by which the spike lowers it.

        Args:
            threshold: A number, or a tensor.
            step: Step of the firing window.
        """

    # -- counts --------------------------------------------------------------------------------------------------------

    def counts(self, spikes: Tensor) -> Tensor:
        """The counts of spikes, ``[steps, ...]`` to uint8 ``[...]``.

        Args:
            spikes: Binary spikes of a window.
        """
        total = torch.zeros_like(spikes[0], dtype=torch.uint8)
        for spike in spikes:
            total = self.radix * total + spike.to(torch.uint8)
        return total

    @abstractmethod
    def digits(self, counts: Tensor) -> Tensor:
        """The spikes of counts, ``[...]`` to ``[steps, ...]`` of the same type.

        Args:
            counts: Counts from 0 to T.
        """

    @abstractmethod
    def ones(self, counts: Tensor) -> Tensor:
        """The number of spikes of each count, in the same shape and type.

        Args:
            counts: Counts from 0 to T; other values give numbers without a meaning.
        """


class UnaryCode(Code):
    """A count n is n spikes of the value 1.

    Args:
        largest: T.
    """

    name = "unary"
    radix = 1

    def __init__(self, largest: int) -> None:
        super().__init__(largest, largest)

    def places(self, step: int) -> int:
        del step
        return 0

    def share(self, step: int) -> float:
        del step
        return 1 / self.steps

    def part(self, constant: Tensor, step: int) -> Tensor:
        del step
        return constant / self.steps

    def spread(self, constant: Tensor) -> Tensor:
        return torch.cat([constant / self.steps] * self.steps)  # This keeps the layout of channels, as repeat does not.

    def currents(self, linear_map: Callable[[Tensor, float], Tensor], spikes: Tensor) -> Tensor:
        return linear_map(spikes, 1 / self.steps)

    def weigh(self, currents: Tensor) -> Tensor:
        return currents

    @property
    def plain(self) -> Code:
        return self

    def check_delay(self, name: str, delay: int) -> None:
        pass  # Early firing changes counts, within the bound of the theorem.

    def saturate(self, membrane: Tensor, threshold: Any) -> None:
        pass  # A window has T steps, and a neuron fires once in each at most.

    def excess(self, membrane: Tensor, threshold: Any) -> Tensor | None:
        del membrane, threshold
        return None  # It stays in the membrane.

    def level(self, threshold: Any, step: int) -> Any:
        del step
        return threshold

    def digits(self, counts: Tensor) -> Tensor:
        steps = torch.arange(self.steps, dtype=counts.dtype, device=counts.device)
        return (steps.view(-1, *[1] * counts.dim()) < counts).to(counts.dtype)

    def ones(self, counts: Tensor) -> Tensor:
        return counts


class BinaryCode(Code):
    """A count is its binary digits, most significant first; a digit of 1 is a spike.

    Biases and other currents without spikes join once, in the last step: it has the weight 1.

    Args:
        largest: T.
    """

    name = "binary"
    radix = 2

    def __init__(self, largest: int) -> None:
        super().__init__(largest, largest.bit_length())
        self._plain = UnaryCode(self.steps)

    def places(self, step: int) -> int:
        return self.steps - step if 1 <= step <= self.steps else 0

    def share(self, step: int) -> float:
        return float(step == self.steps)

    def part(self, constant: Tensor, step: int) -> Tensor:
        return constant if step == self.steps else torch.zeros_like(constant)

    def spread(self, constant: Tensor) -> Tensor:
        return torch.cat([self.part(constant, step) for step in range(1, self.steps + 1)])

    def currents(self, linear_map: Callable[[Tensor, float], Tensor], spikes: Tensor) -> Tensor:
        steps = enumerate(spikes.chunk(self.steps), 1)
        return torch.cat([shift(linear_map(spike, self.share(step)), self.places(step)) for step, spike in steps])

    def weigh(self, currents: Tensor) -> Tensor:
        steps = enumerate(currents.chunk(self.steps), 1)
        return torch.cat([shift(current, self.places(step)) for step, current in steps])

    @property
    def plain(self) -> Code:
        return self._plain

    def check_delay(self, name: str, delay: int) -> None:
        if delay < self.lossless_delay:
            raise QsdError(
                f"neuron {name} has a delay of {delay}, and in the binary code the first digit of a count needs all "
                f"{self.steps} steps of the input: leave the delay at {self.lossless_delay}, or use code='unary'."
            )

    def saturate(self, membrane: Tensor, threshold: Any) -> None:
        # Half a threshold above T of them: the product T * threshold may be rounded down, and the last digit be lost.
        membrane.clamp_(max=self._most(threshold))

    def excess(self, membrane: Tensor, threshold: Any) -> Tensor | None:
        return (membrane - self._most(threshold)).clamp_(min=0)

    def _most(self, threshold: Any) -> Any:
        return (self.largest + 0.5) * threshold

    def level(self, threshold: Any, step: int) -> Any:
        return threshold * 2 ** self.places(step)

    def digits(self, counts: Tensor) -> Tensor:
        whole = counts.long()
        return torch.stack([whole >> self.places(step) & 1 for step in range(1, self.steps + 1)]).to(counts.dtype)

    def ones(self, counts: Tensor) -> Tensor:
        # A number minus its halves, rounded down, again and again: the number of its ones (Legendre). T is at most
        # 255, and bytes are many times faster than a table.
        whole = counts.to(torch.uint8)
        ones = whole.clone()
        for place in range(1, self.steps):
            ones -= whole >> place
        return ones.to(counts.dtype)


def build_code(name: CodeName, largest: int) -> Code:
    """The code of a name.

    Args:
        name: ``"unary"`` or ``"binary"``.
        largest: T, the largest count.

    Raises:
        QsdError: If the name is unknown.
    """
    check_code(name)
    return UnaryCode(largest) if name == "unary" else BinaryCode(largest)


def check_code(name: str) -> None:
    """Refuse the name of an unknown code.

    Args:
        name: Name of a code.

    Raises:
        QsdError: If it is unknown.
    """
    if name not in CODES:
        raise QsdError(f"code={name!r} is unknown; use 'unary' or 'binary'.")
