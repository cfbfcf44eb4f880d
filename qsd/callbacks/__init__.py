"""Lightning callbacks."""

from qsd.callbacks.conversion import ConvertToSpikeDriven
from qsd.callbacks.predictions import PredictionWriter

__all__ = ["ConvertToSpikeDriven", "PredictionWriter"]
