"""The same spike counts in either code: the spikes that carry them, and their additions."""

from dataclasses import replace

from torch import Tensor

from qsd.energy.table import CodeCost, Energy
from qsd.spiking.codes import CODES, Code, build_code
from qsd.spiking.layers import LayerInputs, Operations, TimedLayer
from qsd.spiking.network import SpikingNetwork


class CodeCounter:
    """Adds up spikes and additions in every code that the network's counts can travel in.

    A network whose neurons fire early has no counts that do not depend on time, and is counted in its own code alone.

    Args:
        spiking: The converted network.
    """

    def __init__(self, spiking: SpikingNetwork) -> None:
        self.own = spiking.code
        others = [build_code(name, spiking.time_steps) for name in CODES if name != self.own.name]
        self.codes: list[Code] = [self.own, *(others if spiking.lossless else [])]
        self.codes.sort(key=lambda code: CODES.index(code.name))
        self._spikes = {code.name: 0.0 for code in self.codes}
        self._additions = {code.name: {"merged": 0.0, "unmerged": 0.0} for code in self.codes}

    def add(self, layer: TimedLayer, inputs: LayerInputs, operations: Operations) -> None:
        """Add one call of a layer.

        Args:
            layer: The layer.
            inputs: Inputs of the call.
            operations: Its operations in the network's own code.
        """
        for code in self.codes:
            counted = operations if code is self.own else layer.operations(replace(inputs, code=code, brief=True))
            if counted is not None:
                self._spikes[code.name] += counted.spikes
                for key, number in counted.additions.items():
                    self._additions[code.name][key] += number

    def add_values(self, additions: float, counts: Tensor | None) -> None:
        """Add a sum outside of layers.

        Args:
            additions: Its additions in the network's own code.
            counts: The counts that it adds; ``None`` if it adds currents, which come in every step.
        """
        for code in self.codes:
            number = additions * code.steps / self.own.steps if counts is None else float(code.ones(counts).sum())
            for key in self._additions[code.name]:
                self._additions[code.name][key] += number

    def costs(self, energy: Energy) -> list[CodeCost]:
        """The cost in every code, per image.

        Args:
            energy: The energy of the same runs, its layers finished.
        """
        mac, ac = energy.prices.mac_pj * 1e-9, energy.prices.ac_pj * 1e-9  # pJ to mJ
        form = "merged" if energy.merged else "unmerged"
        macs = sum(layer.macs[form] for layer in energy.layers)
        found = []
        for code in self.codes:
            additions = self._additions[code.name][form] / energy.images
            shifts = additions if code.radix > 1 else 0.0
            spikes = self._spikes[code.name] / energy.images
            found.append(CodeCost(code.name, code.steps, spikes, additions, shifts, macs * mac + additions * ac))
        return found
