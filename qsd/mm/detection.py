"""Spiking necks and heads of mmdet's detectors: a neuron in front of every convolution and linear layer.

They take mmdet's own arguments and a ``spike_cfg`` (see `qsd.mm.layers.SpikeSettings`); anchors, assignment, losses
and post-processing are mmdet's. The neuron and its step are the same in training and in evaluation.
"""

from itertools import pairwise
from typing import Any

import torch
from mmdet.models.dense_heads import RetinaHead, RPNHead
from mmdet.models.necks import FPN
from mmdet.models.roi_heads.bbox_heads import ConvFCBBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmengine.registry import MODELS
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.mm.layers import CLASSIFIER, InitializeSteps, SpikeConv2d, SpikeDeconv2d, SpikeLinear, spike_conv_cfg

Config = dict[str, Any] | None


def _initialization(scores: str, boxes: str, **scores_bias: float) -> dict[str, Any]:
    """He's initialisation of hidden layers. mmdet's own (0.01) is too small for neurons to reach their threshold."""
    override = [{**CLASSIFIER, **scores_bias, "name": scores}, {"type": "Normal", "std": 0.01, "name": boxes}]
    return {"type": "Kaiming", "layer": "Conv2d", "mode": "fan_in", "override": override}


@MODELS.register_module()
class SpikeFPN(InitializeSteps, FPN):
    """Feature pyramid whose lateral and output convolutions each follow a neuron.

    Sums and nearest-neighbour enlargements act on currents between them.

    Args:
        spike_cfg: Fields of `SpikeSettings`.
        norm_cfg: ``dict(type="BN")`` for batch norms after the convolutions, or ``None``.
        arguments: Those of mmdet's ``FPN``.
    """

    def __init__(self, spike_cfg: Config = None, norm_cfg: Config = None, **arguments: Any) -> None:
        super().__init__(conv_cfg=spike_conv_cfg(spike_cfg, norm_cfg), norm_cfg=None, act_cfg=None, **arguments)


@MODELS.register_module()
class SpikeRPNHead(InitializeSteps, RPNHead):
    """Region proposals: one or more convolutions, then a score and a box per anchor, each after a neuron.

    Args:
        spike_cfg: Fields of `SpikeSettings`.
        arguments: Those of mmdet's ``RPNHead``.
    """

    def __init__(self, spike_cfg: Config = None, **arguments: Any) -> None:
        self.spike_cfg = spike_cfg
        super().__init__(**{"init_cfg": _initialization("rpn_cls", "rpn_reg"), **arguments})

    def _init_layers(self) -> None:
        sizes = [self.in_channels] + [self.feat_channels] * self.num_convs
        self.rpn_conv = _stack(sizes, self.spike_cfg)
        anchors, hidden = self.num_base_priors, self.feat_channels
        self.rpn_cls = SpikeConv2d(hidden, anchors * self.cls_out_channels, 1, spike_cfg=self.spike_cfg)
        self.rpn_reg = SpikeConv2d(hidden, anchors * self.bbox_coder.encode_size, 1, spike_cfg=self.spike_cfg)

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A level's currents ``[B, C, H, W]`` to scores ``[B, A, H, W]`` and box deltas ``[B, 4 A, H, W]``."""
        x = self.rpn_conv(x)
        return self.rpn_cls(x), self.rpn_reg(x)


@MODELS.register_module()
class SpikeRetinaHead(InitializeSteps, RetinaHead):
    """RetinaNet's two stacks of convolutions, each convolution after a neuron.

    Args:
        spike_cfg: Fields of `SpikeSettings`.
        arguments: Those of mmdet's ``RetinaHead``.
    """

    def __init__(self, spike_cfg: Config = None, **arguments: Any) -> None:
        self.spike_cfg = spike_cfg
        super().__init__(**{"init_cfg": _initialization("retina_cls", "retina_reg", bias_prob=0.01), **arguments})

    def _init_layers(self) -> None:
        sizes = [self.in_channels] + [self.feat_channels] * self.stacked_convs
        self.cls_convs, self.reg_convs = _stack(sizes, self.spike_cfg), _stack(sizes, self.spike_cfg)
        anchors = self.num_base_priors
        kernel: dict[str, Any] = {"padding": 1, "spike_cfg": self.spike_cfg}
        self.retina_cls = SpikeConv2d(sizes[-1], anchors * self.cls_out_channels, 3, **kernel)
        self.retina_reg = SpikeConv2d(sizes[-1], anchors * self.bbox_coder.encode_size, 3, **kernel)


@MODELS.register_module()
class SpikeConvFCBBoxHead(InitializeSteps, ConvFCBBoxHead):
    """Class and box of a region: convolutions and linear layers, each after a neuron, the predictors included.

    Args:
        spike_cfg: Fields of `SpikeSettings`.
        arguments: Those of mmdet's ``ConvFCBBoxHead``.
    """

    def __init__(self, spike_cfg: Config = None, **arguments: Any) -> None:
        self.spike_cfg = spike_cfg
        predictor = {"type": "SpikeLinear", "spike_cfg": spike_cfg}
        super().__init__(cls_predictor_cfg=predictor, reg_predictor_cfg=predictor, **arguments)
        self.relu = nn.Identity()  # The next neuron is the nonlinearity.
        if "init_cfg" not in arguments:
            # mmdet starts box predictors at 0.001, whose step size a few steps of Adam take through zero.
            self.init_cfg = [{**CLASSIFIER, "override": [{"name": "fc_cls"}, {"name": "fc_reg"}]}]
            hidden = [{"name": name} for name in ("shared_fcs", "cls_fcs", "reg_fcs")]
            self.init_cfg.append({"type": "Xavier", "distribution": "uniform", "override": hidden})

    def _add_conv_fc_branch(self, num_branch_convs: int, num_branch_fcs: int, *arguments: Any) -> tuple[Any, Any, int]:
        convs, linears, last = super()._add_conv_fc_branch(num_branch_convs, num_branch_fcs, *arguments)
        sizes = [(layer.in_features, layer.out_features) for layer in linears]
        channels = [conv.in_channels for conv in convs] + [conv.out_channels for conv in convs[-1:]]
        spiking = nn.ModuleList(SpikeLinear(*size, spike_cfg=self.spike_cfg) for size in sizes)
        return nn.ModuleList(_stack(channels, self.spike_cfg)), spiking, last


@MODELS.register_module()
class SpikeShared2FCBBoxHead(SpikeConvFCBBoxHead):
    """Two shared linear layers, then class and box, each after a neuron.

    Args:
        spike_cfg: Fields of `SpikeSettings`.
        arguments: Those of mmdet's ``Shared2FCBBoxHead``.
    """

    def __init__(self, spike_cfg: Config = None, **arguments: Any) -> None:
        super().__init__(spike_cfg, num_shared_fcs=2, **arguments)


@MODELS.register_module()
class SpikeFCNMaskHead(InitializeSteps, FCNMaskHead):
    """Mask of a region: convolutions, one that doubles the size, and one mask per class, each after a neuron.

    Args:
        spike_cfg: Fields of `SpikeSettings`.
        arguments: Those of mmdet's ``FCNMaskHead``; the enlargement is its default, a transposed convolution.

    Raises:
        QsdError: For another enlargement.
    """

    def __init__(self, spike_cfg: Config = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        if (self.upsample_method, self.scale_factor) != ("deconv", 2):
            raise QsdError(f"upsample_cfg={self.upsample_cfg}: spiking mask heads have a 'deconv' with scale_factor=2.")
        hidden = self.conv_out_channels
        self.convs = _stack([self.in_channels] + [hidden] * self.num_convs, spike_cfg)
        self.upsample = SpikeDeconv2d(hidden if self.num_convs else self.in_channels, hidden, spike_cfg)
        self.relu = nn.Identity()  # The next neuron is the nonlinearity.
        masks = 1 if self.class_agnostic else self.num_classes
        self.conv_logits = SpikeConv2d(hidden, masks, 1, spike_cfg=spike_cfg)

    def init_weights(self) -> None:
        """He's initialisation, as in mmdet's mask head, which initialises only its own types of layers."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        super().init_weights()

    def _predict_by_feat_single(
        self, mask_preds: Tensor, bboxes: Tensor, labels: Tensor, img_meta: Any, rcnn_test_cfg: Any, **options: Any
    ) -> Tensor:
        if bboxes.dtype != torch.float64:
            return super()._predict_by_feat_single(mask_preds, bboxes, labels, img_meta, rcnn_test_cfg, **options)
        # mmdet samples masks in float32 and fails on boxes in float64, in which conversions are verified. It also
        # rescales the boxes in place: here a copy, so that they keep their precision.
        narrow = mask_preds.float(), bboxes.float()
        masks = super()._predict_by_feat_single(*narrow, labels, img_meta, rcnn_test_cfg, **options)
        if options.get("rescale"):
            bboxes /= bboxes.new_tensor(img_meta["scale_factor"]).repeat(1, 2)
        return masks


def _stack(sizes: list[int], spike_cfg: Config) -> nn.Sequential:
    """3x3 convolutions in a row, from the first number of channels to the last."""
    return nn.Sequential(*(SpikeConv2d(i, o, 3, padding=1, spike_cfg=spike_cfg) for i, o in pairwise(sizes)))
