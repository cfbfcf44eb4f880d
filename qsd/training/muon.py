"""Muon with sums in float32, for processors that have no units for bfloat16."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from timm.optim import Muon, OptimInfo, muon
from timm.optim._optim_factory import default_registry


class MuonFloat32(Muon):
    """timm's Muon, whose Newton-Schulz iteration runs in float32 instead of bfloat16.

    Muon (Jordan et al., 2024) replaces the momentum of a weight matrix or convolution by the nearest orthogonal matrix;
    vectors are updated by AdamW. A processor without units for bfloat16 emulates them: for a network of 0.4 million
    parameters a step of the optimizer took ten times as long there as in float32.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters.

        Args:
            closure: Computes the loss anew, if it is given.
        """
        # timm has no argument for the type of the iteration, only its function has.
        iteration = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
        with patch.object(muon, "zeropower_via_newtonschulz", iteration):
            return super().step(closure)


default_registry.register(
    OptimInfo("muon32", MuonFloat32, "Muon whose iteration runs in float32", has_momentum=True, has_betas=True)
)
