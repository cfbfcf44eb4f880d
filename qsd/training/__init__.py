"""Parts of a training that know no framework. The task, the callbacks and the hooks of `qsd.mm` use them."""

from qsd.training import muon  # which makes its optimizer known to timm

__all__ = ["muon"]
