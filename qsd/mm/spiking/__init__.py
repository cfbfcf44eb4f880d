"""Conversion of whole detectors and segmenters to binary spikes, part by part, and its measurements."""

from qsd.mm.spiking.comparison import DetectionComparison, compare_model
from qsd.mm.spiking.measuring import STAGES, DetectorMeasurements, ImageSubset, load_part, record_model, write_model
from qsd.mm.spiking.model import ConvertedModel, Simulation, convert_model, predict, total_energy
from qsd.mm.spiking.segments import DENSE

__all__ = [
    "DENSE",
    "STAGES",
    "ConvertedModel",
    "DetectionComparison",
    "DetectorMeasurements",
    "ImageSubset",
    "Simulation",
    "compare_model",
    "convert_model",
    "load_part",
    "predict",
    "record_model",
    "total_energy",
    "write_model",
]
