"""Quantized spike-driven vision transformers: training, lossless conversion to binary spikes, and their cost.

Importing this package registers its models with timm: ``timm.create_model("qsd_15m", num_classes=10)``.
"""

from qsd._version import __version__
from qsd.energy import measure_energy
from qsd.errors import QsdError
from qsd.integer import IntegerNetwork, to_integer
from qsd.kernels import set_kernels
from qsd.layers import initialize_neurons, initialize_steps, set_integer_operands, set_lean
from qsd.models import load_reference_weights, load_weights
from qsd.packing import load_packed, model_size, save_packed
from qsd.publishing import save_pretrained
from qsd.spiking import (
    SpikingNetwork,
    audit_spike_driven,
    calibrate_delays,
    compare_counts,
    count_spikes,
    to_spike_driven,
)

__all__ = [
    "IntegerNetwork",
    "QsdError",
    "SpikingNetwork",
    "__version__",
    "audit_spike_driven",
    "calibrate_delays",
    "compare_counts",
    "count_spikes",
    "initialize_neurons",
    "initialize_steps",
    "load_packed",
    "load_reference_weights",
    "load_weights",
    "measure_energy",
    "model_size",
    "save_packed",
    "save_pretrained",
    "set_integer_operands",
    "set_kernels",
    "set_lean",
    "to_integer",
    "to_spike_driven",
]
