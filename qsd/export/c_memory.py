"""Memory of a generated C program: where each signal lies in one static array, and from when to when."""

from dataclasses import dataclass, field

from qsd.integer import Description
from qsd.integer.description import AnyLayer

_ALIGNMENT = 4


@dataclass
class Memory:
    """Places of signals in one array of bytes. A place is used again when nothing needs its signal any more.

    Attributes:
        network: The network.
        steps: Time steps of a signal that lie in memory, 1 in counts.
        places: By name of a signal its first byte.
        scratch: By name of a layer the first byte of the memory that it needs while it runs.
        size: Size of the array in bytes.
    """

    network: Description
    steps: int
    places: dict[str, int] = field(default_factory=dict)
    scratch: dict[str, int] = field(default_factory=dict)
    size: int = 0

    def __post_init__(self) -> None:
        layers = self.network.layers
        self._bytes = {layer.name: self._holds_bytes(layer) for layer in layers}
        last = self._last_uses()
        live: dict[str, tuple[int, int, int]] = {}  # First byte, size, last use.
        for number, layer in enumerate(layers):
            live = {name: block for name, block in live.items() if block[2] >= number}
            if layer.kind == "reshape":  # The same memory, whose last use counts both.
                self.places[layer.name] = self.places[layer.inputs[0]]
                continue
            wanted = [(layer.name, layer.size * self.steps * self._item(layer.name), last[layer.name])]
            if needed := self._scratch_size(layer):
                wanted.append((f"{layer.name}.scratch", needed, number))
            for name, size, end in wanted:
                start = self._free(size, live)
                live[name] = start, size, end
                self.size = max(self.size, start + size)
            self.places[layer.name] = live[layer.name][0]
            self.scratch[layer.name] = live[wanted[-1][0]][0]

    def holds_bytes(self, name: str) -> bool:
        """Whether a signal is spikes or counts, one byte each; others are integers of 4 bytes.

        Args:
            name: Name of the signal.
        """
        return self._bytes[name]

    def _holds_bytes(self, layer: AnyLayer) -> bool:
        kinds = {before.name: before for before in self.network.layers}
        while layer.kind in ("reshape", "permute"):
            layer = kinds[layer.inputs[0]]
        return layer.kind in ("neuron", "max_pool", "events")

    def _item(self, name: str) -> int:
        return 1 if self._bytes[name] else 4

    def _last_uses(self) -> dict[str, int]:
        """By signal the number of the last layer that reads it or another view of its memory."""
        last: dict[str, int] = {}
        roots: dict[str, str] = {}
        for number, layer in enumerate(self.network.layers):
            root = roots[layer.inputs[0]] if layer.kind == "reshape" else layer.name
            roots[layer.name] = root
            for name in (root, *(roots[before] for before in layer.inputs)):
                last[name] = number
        last[roots[self.network.output]] = len(self.network.layers)
        return last

    def _scratch_size(self, layer: AnyLayer) -> int:
        """Bytes that a layer needs in steps beside its signals."""
        if self.steps == 1 or layer.kind not in ("rescale", "product", "query"):
            return 0
        sizes = {before.name: before.size for before in self.network.layers}
        inputs = {"rescale": 1, "product": 2, "query": 1}[layer.kind]
        return 4 * sum(sizes[name] for name in layer.inputs[:inputs])

    def _free(self, size: int, live: dict[str, tuple[int, int, int]]) -> int:
        """The first place for so many bytes between the blocks that are in use."""
        start = 0
        for begin, length, _ in sorted(live.values()):
            if start + size <= begin:
                break
            start = max(start, -(-(begin + length) // _ALIGNMENT) * _ALIGNMENT)
        return start
