"""Memory-efficient training: what neurons and layers keep for the backward pass, in half a byte per spike count.

The modules of this package compute what `qsd.functional` and PyTorch's layers compute, with the same gradients. Neurons
and layers call them from one place each, where `qsd.set_lean` says so: by default for large tensors on a processor.
Nothing of it runs in evaluation or under a compiler.
"""

from qsd.lean.layers import Geometry, Synapse, apply_synapse, working_dtype
from qsd.lean.norms import framed_convolutions, is_ordinary, norm_in_training, two_norms
from qsd.lean.operands import cast
from qsd.lean.pooling import spike_max_pool
from qsd.lean.products import exact_matmul
from qsd.lean.spikes import fixed_spikes, learned_spikes
from qsd.lean.statistics import group_of
from qsd.lean.switch import Choice, has_hooks, set_lean, trains_lean

__all__ = [
    "Choice",
    "Geometry",
    "Synapse",
    "apply_synapse",
    "cast",
    "exact_matmul",
    "fixed_spikes",
    "framed_convolutions",
    "group_of",
    "has_hooks",
    "is_ordinary",
    "learned_spikes",
    "norm_in_training",
    "set_lean",
    "spike_max_pool",
    "trains_lean",
    "two_norms",
    "working_dtype",
]
