"""Lightning callbacks."""

from qsd.callbacks.distillation import Distillation
from qsd.callbacks.predictions import PredictionWriter

__all__ = ["Distillation", "PredictionWriter"]
