"""Lightning callbacks."""

from qsd.callbacks.conversion import ConvertToSpikeDriven
from qsd.callbacks.distillation import Distillation
from qsd.callbacks.predictions import PredictionWriter
from qsd.callbacks.spike_statistics import SpikeStatistics

__all__ = ["ConvertToSpikeDriven", "Distillation", "PredictionWriter", "SpikeStatistics"]
