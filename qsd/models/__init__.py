"""Models, registered with timm, and the reading of checkpoints."""

from qsd.models import variants
from qsd.models.checkpoints import load_reference_weights, load_weights
from qsd.models.csdformer import CsdFormer
from qsd.models.qsd_transformer import QsdTransformer

__all__ = ["CsdFormer", "QsdTransformer", "load_reference_weights", "load_weights", "variants"]
