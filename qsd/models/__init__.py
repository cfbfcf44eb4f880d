"""Models, registered with timm, and the reading of checkpoints."""

from qsd.models import variants
from qsd.models.checkpoints import load_reference_weights, load_weights
from qsd.models.csdformer import CsdFormer
from qsd.models.e_spikeformer import ESpikeFormer, ESpikeFormerLarge
from qsd.models.qsd_transformer import QsdTransformer

__all__ = [
    "CsdFormer",
    "ESpikeFormer",
    "ESpikeFormerLarge",
    "QsdTransformer",
    "load_reference_weights",
    "load_weights",
    "variants",
]
