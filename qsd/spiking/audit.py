"""The audit: the inputs of every synaptic operation of a converted network, on real images."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from qsd.errors import QsdError
from qsd.precision import full_float32
from qsd.spiking.batches import Images, image_batches
from qsd.spiking.names import Delay
from qsd.spiking.network import SpikingNetwork
from qsd.spiking.operations import integer_bits, is_binary, shifted_places
from qsd.spiking.watch import Operation, Watch

Status = Literal["binary", "integer", "analog", "unproven"]


@dataclass
class AuditedOperation:
    """A synaptic operation, and the least spike-like input that it had.

    Attributes:
        name: Dotted name of the layer in the trained model, or of the module whose ``forward`` computes it.
        operation: ``"convolution"``, ``"linear"``, ``"product"`` of two activations, ``"pool"`` (a maximum of spikes,
            or of their running sums), or ``"other"``: neither linear nor a neuron.
        status: Kind of the input: ``"binary"`` (0 and 1 only; for a product: on both sides), ``"integer"``,
            ``"analog"``, or ``"unproven"`` if all inputs were zero.
        bits: Width of the widest integer input; for a product of the operand that is not binary.
        stem: Whether it sees the images themselves, and cannot be spike-driven.
        shift: Largest number of binary places by which its currents are shifted; 0 for none, as in the unary code.
        note: The reason why it is not spike-driven, in words.
    """

    name: str
    operation: Literal["convolution", "linear", "product", "pool", "other"]
    status: Status = "unproven"
    bits: int | None = None
    stem: bool = False
    note: str = ""
    shift: int = 0

    @property
    def spike_driven(self) -> bool:
        """Whether it only adds where a spike falls: a binary input; for a product one binary and one integer operand.

        A max-pool may compare running sums of spikes: each grows by one where a spike falls.
        """
        counted = self.operation in ("product", "pool") and self.status == "integer" and not self.note
        return self.status == "binary" or counted


@dataclass
class Audit:
    """Findings of `audit_spike_driven`.

    Attributes:
        operations: In the order of execution.
        images: Number of images.
    """

    operations: list[AuditedOperation] = field(default_factory=list)
    images: int = 0

    @property
    def spike_driven(self) -> bool:
        """Whether every operation but the stem's only adds weights or integers where a spike falls."""
        return all(operation.spike_driven or operation.stem for operation in self.operations)

    def check(self) -> None:
        """Raise unless the network is spike-driven.

        Raises:
            QsdError: Names the operations that are not, or that saw no spike.
        """
        wrong = [o for o in self.operations if not (o.spike_driven or o.stem) and o.status != "unproven"]
        if wrong:
            listed = "; ".join(f"{o.name} ({o.operation}): {o.note}" for o in wrong[:3])
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            inner = any(o.note == _INNER for o in wrong)
            mend = "convert with merge='all'" if inner else "put a neuron in front, or build it from qsd.layers"
            raise QsdError(
                f"{len(wrong)} of {len(self.operations)} operations are not spike-driven: {listed}{more}. To mend it, "
                f"{mend}."
            )
        silent = [o.name for o in self.operations if o.status == "unproven" and not o.stem]
        if silent:
            raise QsdError(
                f"{len(silent)} operations saw no spike on {self.images} images, so nothing is proven of them: "
                f"{', '.join(silent[:3])}{', ...' if len(silent) > 3 else ''}; audit with more images."
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {
            "images": self.images,
            "spike_driven": self.spike_driven,
            "operations": [{**asdict(o), "spike_driven": o.spike_driven} for o in self.operations],
        }

    def table(self) -> Table:
        """A table for the terminal."""
        title = f"Audit on {self.images} images"
        table = Table("operation", "what", "input", "bits", "shift", "", title=title, title_justify="left")
        for o in self.operations:
            verdict = "stem" if o.stem else "spike-driven" if o.spike_driven else o.note or o.status
            bits = "" if o.bits is None else str(o.bits)
            table.add_row(escape(o.name), o.operation, o.status, bits, str(o.shift or ""), escape(verdict))
        return table


_INNER = "an inner layer of a chain without neurons, its input is analog"


@torch.no_grad()
@full_float32()
def audit_spike_driven(
    spiking: SpikingNetwork,
    images: Images,
    delay: Delay = None,
    max_images: int | None = None,
    progress: bool = False,
) -> Audit:
    """Step through a converted network on real images and look at the input of every synaptic operation.

    It watches torch's operations, not module types, so a product or a nonlinearity inside a ``forward`` is seen too.
    Sums, rearrangements and multiplication by a number are no synaptic operations; a number that scales spikes shows
    in the next operation's input.

    Args:
        spiking: The converted network.
        images: ``[B, C, H, W]``, or a data loader.
        delay: Overrides the stored delays, as in `SpikingNetwork.simulate`.
        max_images: Largest number of images.
        progress: Whether to show a progress bar.

    Returns:
        The findings; ``audit.check()`` raises if one of them is not spike-driven.

    Raises:
        QsdError: If there are no images.
    """
    auditor = Auditor(spiking, delay)
    seen = 0
    for batch, _ in image_batches(images, spiking, max_images, "audit" if progress else None):
        auditor.run(batch)
        seen += len(batch)
    return auditor.audit(seen)


class Auditor:
    """An audit in progress, of a network that is run from outside; `audit_spike_driven` runs one itself.

    Args:
        spiking: The converted network.
        delay: Overrides the stored delays, as in `SpikingNetwork.simulate`.
    """

    def __init__(self, spiking: SpikingNetwork, delay: Delay = None) -> None:
        self.spiking, self.delay = spiking, delay
        self._found: dict[tuple[str, str, bool], AuditedOperation] = {}
        self._watch = Watch(spiking, lambda operation: _look(operation, self._found))

    def run(self, images: Tensor) -> Any:
        """Step through the network and note the inputs of its operations.

        Args:
            images: ``[B, C, H, W]``, or currents.

        Returns:
            The network's output.
        """
        with self._watch.on(images):
            return self.spiking.simulate(images, self.delay).logits

    def audit(self, images: int) -> Audit:
        """The findings up to now.

        Args:
            images: Number of images that the runs belong to.
        """
        return Audit(list(self._found.values()), images)


_ORDER: tuple[Status, ...] = ("unproven", "binary", "integer", "analog")


def _look(operation: Operation, found: dict[tuple[str, str, bool], AuditedOperation]) -> None:
    if operation.kind == "reduction":
        return
    if operation.kind == "shift":
        _note_shift(operation, found)
        return
    name = operation.name if operation.layer is not None else f"{operation.name} ({operation.torch_name})"
    # A layer that sees images and currents has two entries: that of the images excuses no other.
    key = (name, operation.kind, operation.image)
    entry = found.setdefault(key, AuditedOperation(name, operation.kind))
    status, bits, note = _judge(operation)
    if operation.image:
        entry.stem, note = True, ""
    entry.status = max(entry.status, status, key=_ORDER.index)
    entry.note = entry.note or note
    if entry.status == "analog":
        entry.bits = None
    elif bits is not None:
        entry.bits = max(entry.bits or 0, bits)


def _note_shift(operation: Operation, found: dict[tuple[str, str, bool], AuditedOperation]) -> None:
    """Note a shift at the operation whose currents it shifts, the last one of its layer before it."""
    layer = operation.layer
    assert layer is not None
    entries = [e for e in found.values() if e.name == layer.name or e.name.startswith(f"{layer.name}.")]
    if entries:
        entries[-1].shift = max(entries[-1].shift, shifted_places(operation.arguments[1]) or 0)


def _judge(operation: Operation) -> tuple[Status, int | None, str]:
    """Status, bits, and the reason why it is not spike-driven."""
    if operation.kind == "other":  # However the values look: nothing but neurons may do more than add.
        return "analog", None, operation.note
    active = operation.activations
    if not all(bool(x.any()) for x in active):
        return "unproven", None, ""
    widths = [1 if is_binary(x) else integer_bits(x) for x in active]
    if operation.kind == "product":
        if 1 not in widths:
            kinds = " times ".join("analog" if w is None else f"{w}-bit integer" for w in widths)
            return ("analog" if None in widths else "integer"), _widest(widths), kinds
        if None in widths:
            return "analog", None, "a binary operand times an analog one"
        return ("binary" if widths == [1, 1] else "integer"), _widest(widths), ""
    if all(w == 1 for w in widths):
        return "binary", 1, ""
    if operation.kind == "pool" and None not in widths:
        return "integer", _widest(widths), ""
    if operation.kind == "pool":
        return "analog", None, f"{operation.torch_name} of values that are no spikes"
    if operation.layer is not None and operation.name != operation.layer.name:
        return "analog", None, _INNER
    values = active[0].unique()
    if len(values) <= 2 and bool((values == 0).any()):
        return _integer_or_analog(widths), widths[0], f"scaled spikes, of {float(values[values != 0][0]):g} each"
    return _integer_or_analog(widths), widths[0], f"its input is {_integer_or_analog(widths)}"


def _integer_or_analog(widths: list[int | None]) -> Status:
    return "analog" if None in widths else "integer"


def _widest(widths: list[int | None]) -> int | None:
    return None if None in widths else max(w for w in widths if w is not None)
