"""Hooks for mmengine's Runner: the counterparts of the Lightning callbacks, one class a module."""

from qsd.mm.hooks.conversion import ConvertToSpikeDrivenHook
from qsd.mm.hooks.spike_statistics import SpikeStatisticsHook, StepSizeHook

__all__ = ["ConvertToSpikeDrivenHook", "SpikeStatisticsHook", "StepSizeHook"]
