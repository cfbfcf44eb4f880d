"""Spiking necks and heads of mmseg's segmenters: a neuron in front of every convolution."""

from typing import Any

from mmengine.registry import MODELS
from mmseg.models.decode_heads import FPNHead
from mmseg.models.necks import FPN
from mmseg.models.utils import Upsample
from torch import nn

from qsd.mm.layers import CLASSIFIER, InitializeSteps, SpikeConv2d, spike_conv_cfg
from qsd.spiking import Conversion, register_conversion

Config = dict[str, Any] | None


@register_conversion(Upsample)
def _upsample(module: nn.Module, name: str, conversion: Conversion) -> nn.Module:
    del name, conversion
    return module  # Linear in the currents.


@MODELS.register_module()
class SpikeSemanticFPN(InitializeSteps, FPN):
    """Feature pyramid whose lateral and output convolutions each follow a neuron.

    Args:
        spike_cfg: Fields of `SpikeSettings`.
        norm_cfg: ``dict(type="BN")`` for batch norms after the convolutions, or ``None``.
        arguments: Those of mmseg's ``FPN``.
    """

    def __init__(self, spike_cfg: Config = None, norm_cfg: Config = None, **arguments: Any) -> None:
        super().__init__(conv_cfg=spike_conv_cfg(spike_cfg, norm_cfg), norm_cfg=None, act_cfg=None, **arguments)


@MODELS.register_module()
class SpikeFPNHead(InitializeSteps, FPNHead):
    """Semantic FPN's head: convolutions and enlargements by level, their sum, a class per pixel.

    A neuron stands in front of each convolution, the last one included; bilinear enlargements act on currents.

    Args:
        spike_cfg: Fields of `SpikeSettings`.
        norm_cfg: ``dict(type="BN")`` for batch norms after the convolutions, or ``None``.
        arguments: Those of mmseg's ``FPNHead``.
    """

    def __init__(self, spike_cfg: Config = None, norm_cfg: Config = None, **arguments: Any) -> None:
        arguments = {"init_cfg": {**CLASSIFIER, "override": {**CLASSIFIER, "name": "conv_seg"}}, **arguments}
        super().__init__(conv_cfg=spike_conv_cfg(spike_cfg, norm_cfg), norm_cfg=None, act_cfg=None, **arguments)
        classify: Any = SpikeConv2d(self.channels, self.out_channels, 1, spike_cfg=spike_cfg)
        dropout: Any = getattr(self, "dropout", None) or nn.Identity()
        # Dropout removes the spikes of whole channels.
        self.conv_seg = nn.Sequential(classify.neuron, dropout, classify.proj)
        self.dropout = None
