"""From spike counts to binary spikes: conversion, and everything about time."""

from qsd.spiking.audit import Audit, audit_spike_driven
from qsd.spiking.calibration import Calibration, calibrate_delays
from qsd.spiking.compare import Comparison, compare_counts
from qsd.spiking.conversion import to_spike_driven
from qsd.spiking.counts import count_spikes
from qsd.spiking.lost_spikes import LostSpikes, measure_lost_spikes
from qsd.spiking.network import SpikingNetwork
from qsd.spiking.results import Stream, Trace
from qsd.spiking.rules import Conversion, register_conversion
from qsd.spiking.streaming import run_frame

__all__ = [
    "Audit",
    "Calibration",
    "Comparison",
    "Conversion",
    "LostSpikes",
    "SpikingNetwork",
    "Stream",
    "Trace",
    "audit_spike_driven",
    "calibrate_delays",
    "compare_counts",
    "count_spikes",
    "measure_lost_spikes",
    "register_conversion",
    "run_frame",
    "to_spike_driven",
]
