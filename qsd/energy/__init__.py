"""Energy of a converted network: operations and data movement, counted from the spikes that really fell, and priced."""

from qsd.energy.counting import OperationCounter, measure_energy
from qsd.energy.geometry import Geometry, dense_macs, fan_out
from qsd.energy.prices import PRESETS, Memory, Preset, Prices, preset_prices, read_prices
from qsd.energy.table import COLUMNS, CodeCost, Energy, LayerEnergy, energy_csv

__all__ = [
    "COLUMNS",
    "PRESETS",
    "CodeCost",
    "Energy",
    "Geometry",
    "LayerEnergy",
    "Memory",
    "OperationCounter",
    "Preset",
    "Prices",
    "dense_macs",
    "energy_csv",
    "fan_out",
    "measure_energy",
    "preset_prices",
    "read_prices",
]
