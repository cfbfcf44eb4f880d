"""Lightning callbacks."""

from qsd.callbacks.predictions import PredictionWriter

__all__ = ["PredictionWriter"]
