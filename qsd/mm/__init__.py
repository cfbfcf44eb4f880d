"""Detection and segmentation through mmdet and mmseg, in OpenMMLab's maintained continuation.

Importing this package makes mmcv's operators work without a compiler (`qsd.mm.ops`) and registers the backbone in
mmengine's root registry; ``qsd.mm.detection`` and ``qsd.mm.segmentation`` register necks and heads. A configuration
names one of them under ``custom_imports``.
"""

from qsd.mm.environment import check_installation, name_configurations

check_installation()
name_configurations()

from qsd.mm import ops  # noqa: E402 - before anything imports mmcv.ops

ops.install()

from qsd.mm import checkpoints  # noqa: E402

checkpoints.install()

from qsd.mm.hooks import checkpoint  # noqa: E402

checkpoint.install()

from qsd.mm.backbone import SpikeTransformerBackbone  # noqa: E402
from qsd.mm.hooks import (  # noqa: E402
    ConvertToSpikeDrivenHook,
    DistillationHook,
    NeuronInitializationHook,
    OptimizerStateHook,
    SpikeStatisticsHook,
    StepSizeHook,
)
from qsd.mm.layers import SpikeConv2d, SpikeSettings  # noqa: E402
from qsd.mm.optim import StepSizeOptimWrapperConstructor  # noqa: E402
from qsd.mm.spiking import ConvertedModel, convert_model  # noqa: E402

SpikingModel = ConvertedModel  # Its name in version 0.1.0.

__all__ = [
    "ConvertToSpikeDrivenHook",
    "ConvertedModel",
    "DistillationHook",
    "NeuronInitializationHook",
    "OptimizerStateHook",
    "SpikeConv2d",
    "SpikeSettings",
    "SpikeStatisticsHook",
    "SpikeTransformerBackbone",
    "SpikingModel",
    "StepSizeHook",
    "StepSizeOptimWrapperConstructor",
    "convert_model",
    "ops",
]
