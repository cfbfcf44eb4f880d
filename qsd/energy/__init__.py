"""Energy of a converted network: operations counted from the spikes that really fell, priced by three conventions."""

from qsd.energy.counting import OperationCounter, measure_energy
from qsd.energy.geometry import Geometry, dense_macs, fan_out
from qsd.energy.table import COLUMNS, PRESETS, CodeCost, Energy, LayerEnergy, Preset

__all__ = [
    "COLUMNS",
    "PRESETS",
    "CodeCost",
    "Energy",
    "Geometry",
    "LayerEnergy",
    "OperationCounter",
    "Preset",
    "dense_macs",
    "fan_out",
    "measure_energy",
]
