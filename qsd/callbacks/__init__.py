"""Lightning callbacks."""

from qsd.callbacks.distillation import Distillation
from qsd.callbacks.predictions import PredictionWriter
from qsd.callbacks.spike_statistics import SpikeStatistics

__all__ = ["Distillation", "PredictionWriter", "SpikeStatistics"]
