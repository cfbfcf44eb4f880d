"""mmcv's operators without a compiler: ``mmcv._ext`` made of torchvision's.

OpenMMLab's detectors call a compiled extension of mmcv for non-maximum suppression and RoIAlign. torchvision brings
the same operators, compiled for the PyTorch at hand. `install` makes ``import mmcv.ops`` work with them where no
compiled extension is installed; a compiled one always wins. On a CPU both give the same bits.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from qsd.errors import QsdError

EXTENSION = "mmcv._ext"
_TORCHVISION = f"torchvision {torchvision.__version__}"


def provider() -> str:
    """The provider of the operators in ``mmcv.ops``, in words.

    Raises:
        QsdError: If a compiled extension is installed that this PyTorch cannot load.
    """
    try:
        extension = importlib.import_module(EXTENSION)
    except ImportError as error:
        raise QsdError(
            f"mmcv's compiled operators do not load with torch {torch.__version__} ({error}); compile them anew, or "
            "do without: pip uninstall onedl-mmcv, then pip install --no-cache-dir onedl-mmcv"
        ) from error
    return _TORCHVISION if isinstance(extension, _Extension) else "mmcv's compiled extension"


def _not_covered(operation: str) -> QsdError:
    return QsdError(
        f"{operation} needs mmcv's compiled operators; torchvision's cover NMS, RoIAlign (average) and the sigmoid "
        "focal loss. To compile: MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir --force-reinstall "
        "--no-deps --no-binary onedl-mmcv onedl-mmcv"
    )


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32: not every device has these operators in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices ``[K]`` of the boxes after non-maximum suppression, by descending score.

    Args:
        boxes: Corners ``[N, 4]`` in pixels.
        scores: ``[N]``.
        iou_threshold: Overlap above which the box with the lower score is removed.
        offset: 0 (widths are ``x2 - x1``).
    """
    if offset != 0:
        raise _not_covered(f"NMS with offset={offset}")
    return torch.ops.torchvision.nms(_wide(boxes), _wide(scores), iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write features of regions into ``output [K, C, aligned_height, aligned_width]``.

    Args:
        input: Feature map ``[B, C, H, W]``.
        rois: Index of the image and corners in pixels ``[K, 5]``.
        output: Tensor that the result is written to.
        argmax_y: Unused (for maximum pooling).
        argmax_x: Unused (for maximum pooling).
        aligned_height: Rows of the grid.
        aligned_width: Columns of the grid.
        spatial_scale: Feature pixels per image pixel.
        sampling_ratio: Samples per cell and direction; 0 for the number of pixels.
        pool_mode: 1 (average).
        aligned: Shift by half a pixel.
    """
    del argmax_y, argmax_x
    _check_average(pool_mode)
    features = _wide(input)
    size = (spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned)
    output.copy_(torch.ops.torchvision.roi_align(features, rois.to(features.dtype), *size))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of `roi_align_forward` by its feature map into ``grad_input [B, C, H, W]``.

    Args:
        grad_output: Gradient by the output.
        rois: Index of the image and corners in pixels ``[K, 5]``.
        argmax_y: Unused.
        argmax_x: Unused.
        grad_input: Tensor that the result is written to.
        aligned_height: Rows of the grid.
        aligned_width: Columns of the grid.
        spatial_scale: Feature pixels per image pixel.
        sampling_ratio: Samples per cell and direction.
        pool_mode: 1 (average).
        aligned: Shift by half a pixel.
    """
    del argmax_y, argmax_x
    _check_average(pool_mode)
    grad = _wide(grad_output)
    size = (spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned)
    grad_input.copy_(torch.ops.torchvision._roi_align_backward(grad, rois.to(grad.dtype), *size))


def _check_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise _not_covered("RoIAlign with pool_mode='max'")


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss of every logit into ``output [N, C]``.

    Args:
        input: Logits ``[N, C]``.
        target: Classes ``[N]``; C is the background.
        weight: Empty: weights by class are not supported.
        output: Tensor that the result is written to.
        gamma: Exponent of the modulating factor.
        alpha: Weight of the positive logits.
    """
    _check_no_weight(weight)
    output.copy_(sigmoid_focal_loss(_wide(input), _one_hot(input, target), alpha, gamma))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the gradient of `sigmoid_focal_loss_forward`, summed, by its logits into ``grad_input [N, C]``.

    Args:
        input: Logits ``[N, C]``.
        target: Classes ``[N]``.
        weight: Empty: weights by class are not supported.
        grad_input: Tensor that the result is written to.
        gamma: Exponent of the modulating factor.
        alpha: Weight of the positive logits.
    """
    _check_no_weight(weight)
    with torch.enable_grad():
        logits = _wide(input).detach().requires_grad_()
        loss = sigmoid_focal_loss(logits, _one_hot(input, target), alpha, gamma, reduction="sum")
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def _one_hot(input: Tensor, target: Tensor) -> Tensor:
    return F.one_hot(target, input.shape[1] + 1)[:, :-1].to(_wide(input).dtype)


def _check_no_weight(weight: Tensor) -> None:
    if weight.numel():
        raise _not_covered("the sigmoid focal loss with weights by class")


def get_compiler_version() -> str:
    """The compiler in mmcv's report of the environment."""
    return f"none: operators of {_TORCHVISION}"


def get_compiling_cuda_version() -> str:
    """The CUDA version in mmcv's report of the environment."""
    return torch.version.cuda or "none"


_OPERATORS: tuple[Callable[..., Any], ...] = (
    nms,
    roi_align_forward,
    roi_align_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
    get_compiler_version,
    get_compiling_cuda_version,
)


class _Extension(ModuleType):
    """A module with the operators above; a call of any other operator is an error."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def operator(*_arguments: Any, **_options: Any) -> None:
            raise _not_covered(f"mmcv's operator {name!r}")

        return operator


class _ExtensionLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Extension(spec.name, __doc__)

    def exec_module(self, module: ModuleType) -> None:
        for function in _OPERATORS:
            setattr(module, function.__name__, function)


class _ExtensionFinder(MetaPathFinder):
    """The last of Python's finders, so that a compiled extension is found first."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        return ModuleSpec(fullname, _ExtensionLoader()) if fullname == EXTENSION else None


def install() -> None:
    """Let ``import mmcv._ext`` find torchvision's operators if there are no compiled ones.

    A second call has no effect.
    """
    if not any(isinstance(finder, _ExtensionFinder) for finder in sys.meta_path):
        sys.meta_path.append(_ExtensionFinder())
    _replace_substitutes()


def _replace_substitutes() -> None:
    """Give the operators to modules that were imported before and found none.

    mmdet then defines functions and classes of the same names that say that mmcv must be compiled.
    """
    early = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in ("mmdet", "mmseg")]
    substitutes = [(module, name) for module in early for name, value in vars(module).items() if _is_substitute(value)]
    if substitutes:
        operators = importlib.import_module("mmcv.ops")
        for module, name in substitutes:
            setattr(module, name, getattr(operators, name.lstrip("_"), getattr(module, name)))


def _is_substitute(value: Any) -> bool:
    function = vars(value).get("__init__") if isinstance(value, type) else value
    constants = function.__code__.co_consts if isinstance(function, FunctionType) else ()
    return any("mmcv to be compiled with ops" in constant for constant in constants if isinstance(constant, str))
