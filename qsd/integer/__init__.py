"""Networks of small integers: no floats and, in steps, no multiplication behind the first layer."""

from qsd.integer.builder import Builder, converts
from qsd.integer.conversion import to_integer
from qsd.integer.description import Description
from qsd.integer.margins import ChangedCount, Margin
from qsd.integer.network import IntegerAudit, IntegerComparison, IntegerNetwork, LayerWidths
from qsd.integer.signals import Signal
from qsd.integer.simulator import Values
from qsd.integer.tracing import Call

__all__ = [
    "Builder",
    "Call",
    "ChangedCount",
    "Description",
    "IntegerAudit",
    "IntegerComparison",
    "IntegerNetwork",
    "LayerWidths",
    "Margin",
    "Signal",
    "Values",
    "converts",
    "to_integer",
]
