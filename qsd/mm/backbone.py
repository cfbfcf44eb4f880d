"""The networks of this package as backbones of OpenMMLab's detectors and segmenters."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import timm
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qsd.errors import QsdError
from qsd.models import load_weights

logger = logging.getLogger(__name__)


# In mmengine's own registry, which those of mmdet and mmseg fall back to.
@MODELS.register_module()
class SpikeTransformerBackbone(BaseModule):
    """Features of a model of this package by its timm name: the currents of its residual stream.

    Args:
        model: Name, such as ``"qsd_15m"``.
        out_indices: Stages whose features are returned; stages after the last one are left out.
        frozen_stages: -1 for none; 0 for the stem; n for the stem and the first n stages. They stay in evaluation.
        norm_eval: Keep all batch norms in evaluation: their statistics come from the pretrained weights.
        grad_checkpointing: Recompute blocks in the backward pass.
        model_args: Further arguments of the model, such as ``time_steps``.
        init_cfg: ``dict(type="Pretrained", checkpoint=FILE)`` with a checkpoint of any kind that
            `qsd.load_weights` reads, or ``None``.

    Raises:
        QsdError: For indices that the model does not have, or another kind of ``init_cfg``.
    """

    def __init__(
        self,
        model: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        grad_checkpointing: bool = False,
        model_args: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        if init_cfg is not None and (init_cfg.get("type") != "Pretrained" or not init_cfg.get("checkpoint")):
            raise QsdError(f"init_cfg={dict(init_cfg)}: use dict(type='Pretrained', checkpoint=FILE), or None.")
        super().__init__(None)
        self.checkpoint = init_cfg and init_cfg["checkpoint"]
        self.name, self.model_args = model, {**(model_args or {})}
        self.model: Any = self._build()
        stages = len(self.model.feature_info)
        wrong = [i for i in out_indices if not 0 <= i < stages]
        if wrong or not -1 <= frozen_stages <= stages:
            raise QsdError(
                f"out_indices={tuple(out_indices)}, frozen_stages={frozen_stages}: {model} has the stages 0 to "
                f"{stages - 1}, and -1 to {stages} of them can be frozen."
            )
        self.out_indices = tuple(out_indices)
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.model.prune_intermediate_layers(list(self.out_indices))
        self.model.set_grad_checkpointing(grad_checkpointing)
        self.steps_are_set = False
        self.train()

    def _build(self) -> Any:
        return timm.create_model(self.name, num_classes=0, **self.model_args)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the features, in the order of ``out_indices``."""
        return tuple(self.model.feature_info[i]["num_chs"] for i in self.out_indices)

    @property
    def strides(self) -> tuple[int, ...]:
        """Image pixels per feature pixel, in the order of ``out_indices``."""
        return tuple(self.model.feature_info[i]["reduction"] for i in self.out_indices)

    def init_weights(self) -> None:
        """Load the pretrained weights, if any; a new model has its initial ones."""
        if self.checkpoint is None:
            if self.norm_eval:
                logger.warning(
                    "norm_eval=True without pretrained weights: batch norms keep their initial statistics, and most "
                    "neurons stay silent. Pass --pretrained, or model.backbone.norm_eval=False."
                )
        else:
            whole = self._build()
            self.steps_are_set = not load_weights(whole, self.checkpoint)
            kept = self.model.state_dict().keys()
            self.model.load_state_dict({key: value for key, value in whole.state_dict().items() if key in kept})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images ``[B, C, H, W]`` to features ``[B, C_i, H / stride_i, W / stride_i]``."""
        return tuple(self.model.forward_intermediates(x, indices=list(self.out_indices), intermediates_only=True))

    def train(self, mode: bool = True) -> "SpikeTransformerBackbone":
        """Training mode, except for frozen parts."""
        super().train(mode)
        for module in self._frozen():
            module.eval().requires_grad_(False)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _frozen(self) -> Iterator[nn.Module]:
        if self.frozen_stages < 0:
            return
        names = [info["module"] for info in self.model.feature_info[: self.frozen_stages]]
        yield self.model.stem
        yield from (self.model.get_submodule(name) for name in names)
