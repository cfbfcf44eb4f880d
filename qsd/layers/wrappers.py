"""Models within wrappers of PyTorch: compiled, averaged, or spread over devices."""

import copy
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_INNER: dict[type, str] = {
    OptimizedModule: "_orig_mod",
    DataParallel: "module",
    DistributedDataParallel: "module",
    AveragedModel: "module",
}


def unwrapped(model: nn.Module) -> Any:
    """The model itself, out of ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` or ``AveragedModel``.

    Layers have their own names again. A model with wrapped parts is copied, because the parts are replaced.

    Args:
        model: Any module.
    """
    model = inner_model(model)
    if any(_is_wrapper(module) for module in model.modules()):
        model = copy.deepcopy(model)
        for parent in [*model.modules()]:
            for name, child in parent.named_children():
                if _is_wrapper(child):
                    setattr(parent, name, inner_model(child))
    return model


def inner_model(model: nn.Module) -> Any:
    """The model itself, whose parts may still be wrapped; never a copy.

    Args:
        model: Any module.
    """
    while _is_wrapper(model):
        model = getattr(model, next(name for kind, name in _INNER.items() if isinstance(model, kind)))
    return model


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, tuple(_INNER))
