"""The split of a detector or segmenter into segments, and the module of each segment."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.layers import QuantConv2d, QuantLinear
from qsd.neurons import FloatNeuron

DENSE = "dense"
_SIDE = 64  # pixels: height and width of the random image on which a conversion is checked
_HEADS = ("rpn_head", "bbox_head", "decode_head")


class _Dense(nn.Module):
    """Images to the pyramid's currents and the raw output of the head; names are those of the model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.neck = model.neck if model.with_neck else nn.Identity()
        self.head = dense_head(model)
        self.add_module(self.head, _without_losses(getattr(model, self.head)))

    def forward(self, images: Tensor) -> tuple[Any, Any]:
        features = self.neck(self.backbone(images))
        return features, self.get_submodule(self.head)(features)


class _RegionHead(nn.Module):
    """Currents of regions to the raw output of a RoI head, under its name in the model."""

    def __init__(self, path: str, head: nn.Module) -> None:
        super().__init__()
        self.path = path
        *parents, last = path.split(".")
        holder: nn.Module = self
        for parent in parents:
            holder.add_module(parent, nn.Module())
            holder = holder.get_submodule(parent)
        holder.add_module(last, _without_losses(head))

    def forward(self, currents: Tensor) -> Any:
        return self.get_submodule(self.path)(currents)


def dense_head(model: Any) -> str:
    """Name of the head that runs on the whole pyramid.

    Args:
        model: Model of mmdet or mmseg.

    Raises:
        QsdError: If there is none, or several.
    """
    found = [name for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)]
    if not found or isinstance(getattr(model, found[0]), nn.ModuleList):
        raise QsdError(
            f"{type(model).__name__} cannot be converted: it is neither a detector with one dense head or an RPN head, "
            "nor a segmenter with one decode head."
        )
    return found[0]


def _without_losses(head: nn.Module) -> nn.Module:
    head = copy.deepcopy(head)
    for name, _ in list(head.named_children()):
        if name.startswith("loss"):
            delattr(head, name)
    return head


def cut(model: Any) -> dict[str, tuple[nn.Module, Tensor]]:
    """Segments by name, before their conversion, in the order in which they run, with a random input for each.

    Args:
        model: Model of mmdet or mmseg.

    Raises:
        QsdError: For a model of another structure, or with a layer that does not spike.
    """
    regions = []
    for kind in ("bbox_head", "mask_head"):
        heads = getattr(getattr(model, "roi_head", None), kind, None)
        numbers = [f".{i}" for i in range(len(heads))] if isinstance(heads, nn.ModuleList) else [""]
        regions += [f"roi_head.{kind}{number}" for number in numbers if heads is not None]
    covered = ("backbone", "neck", dense_head(model), *regions)
    for name, _ in model.named_parameters():
        if not name.startswith((*(f"{path}." for path in covered), "auxiliary_head.")):
            raise QsdError(f"layer {name.rpartition('.')[0]} lies outside the parts that are converted: {covered}.")
    for name, module in model.named_modules():
        float_layer = isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d | nn.ReLU)
        if float_layer and name.startswith(covered) and not isinstance(module, QuantConv2d | QuantLinear):
            what = "the ReLU of a float twin" if isinstance(module, FloatNeuron) else f"a {type(module).__name__}"
            raise QsdError(
                f"layer {name} is {what}, without spikes, and cannot be converted; use this package's backbone, neck "
                "and heads (SpikeFPN, ...) with time_steps of 1 or more."
            )
    generator = torch.Generator().manual_seed(0)
    channels = next(m.in_channels for m in model.backbone.modules() if isinstance(m, QuantConv2d))
    parts: dict[str, tuple[nn.Module, Tensor]] = {
        DENSE: (_Dense(model), torch.randn(1, channels, _SIDE, _SIDE, generator=generator))
    }
    for name in regions:
        head = model.get_submodule(name)
        height, width = head.roi_feat_size
        currents = torch.randn(2, head.in_channels, height, width, generator=generator)
        parts[name] = _RegionHead(name, head), currents
    return parts
