"""The augmentation and the preprocessing of the published recipes, built by timm."""

from typing import Any, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms

from qsd.data.dataset import Transform
from qsd.errors import QsdError
from qsd.image_notes import Interpolation


def crop_transform(
    img_size: tuple[int, int], interpolation: Interpolation, channels: int | None = None, **options: Any
) -> Transform:
    """ImageNet's augmentation: a random crop resized, a flip, a policy of distortions, erasing.

    Args:
        img_size: Height and width in pixels.
        interpolation: Interpolation of every resizing.
        channels: Number of equal channels of grey that the distorted image is given; ``None`` leaves its colours.
        **options: For `timm.data.create_transform`.

    Returns:
        From an RGB or grey image to float32 ``[C, H, W]``.
    """
    if channels is None:
        options = {"input_size": (3, *img_size), "is_training": True, "re_mode": "pixel", **options}
        return _checked_transform(interpolation, **options)
    crop, policy, normalize = _training_parts(img_size, interpolation, channels, **options)
    return transforms.Compose([crop, *policy, normalize])


def padded_transform(
    img_size: tuple[int, int],
    interpolation: Interpolation,
    padding: int,
    hflip: float,
    channels: int | None = None,
    **options: Any,
) -> Transform:
    """CIFAR's augmentation: a shift into black padding, a flip, a policy of distortions, erasing.

    Args:
        img_size: Height and width of the images in pixels.
        interpolation: Interpolation of the distortions.
        padding: Greatest shift in pixels.
        hflip: Probability of the horizontal flip.
        channels: Number of equal channels of grey that the distorted image is given; ``None`` leaves its colours.
        **options: For `timm.data.create_transform`.

    Returns:
        From an RGB or grey image to float32 ``[C, H, W]``.
    """
    _, policy, normalize = _training_parts(img_size, interpolation, channels, hflip=hflip, **options)
    crop = transforms.RandomCrop(img_size, padding=padding)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(hflip), *policy, normalize])


def _training_parts(
    img_size: tuple[int, int], interpolation: Interpolation, channels: int | None, **options: Any
) -> tuple[Any, list[Any], Any]:
    """The three parts of timm's augmentation: crop and flip, distortions, normalisation and erasing."""
    options = {"input_size": (3, *img_size), "is_training": True, "re_mode": "pixel", "separate": True, **options}
    crop, policy, normalize = _checked_transform(interpolation, **options)
    to_tensor, norm, *erasing = normalize.transforms
    normalize = transforms.Compose([TableNormalize(to_tensor, norm), *erasing])
    if channels is None:
        return crop, [policy], normalize
    if not policy.transforms:
        return crop, [transforms.Grayscale(channels)], normalize
    # A policy distorts colours and fills borders with a mean of three channels.
    mean = (sum(options["mean"]) / len(options["mean"]),) * 3
    _, policy, _ = _checked_transform(interpolation, **{**options, "mean": mean})
    return crop, [transforms.Grayscale(3), policy, transforms.Grayscale(channels)], normalize


class TableNormalize:
    """Conversion to a tensor and normalisation by a table of the 256 values: the same bits in a fifth of the time.

    Small images take longer for the calls than for the work. Images of other kinds than grey and RGB of 8 bits run
    through the two transforms themselves.

    Args:
        to_tensor: From an image to float32 ``[C, H, W]`` from 0 to 1.
        normalize: Subtracts a mean and divides by a standard deviation by channel.
    """

    def __init__(self, to_tensor: Transform, normalize: Transform) -> None:
        self._transforms = transforms.Compose([to_tensor, normalize])
        self._tables: dict[int, np.ndarray[Any, Any]] = {}

    def __call__(self, image: Image.Image) -> Tensor:
        """An image to float32 ``[C, H, W]``."""
        channels = {"L": 1, "RGB": 3}.get(image.mode)
        if channels is None:
            return self._transforms(image)
        if channels not in self._tables:
            ramp = np.arange(256, dtype=np.uint8).reshape(256, 1)
            values = ramp if channels == 1 else np.repeat(ramp[..., None], 3, 2)
            self._tables[channels] = self._transforms(Image.fromarray(values)).numpy()[..., 0]
        pixels = np.asarray(image).reshape(*image.size[::-1], channels)
        planes = [table.take(pixels[..., index]) for index, table in enumerate(self._tables[channels])]
        return torch.from_numpy(np.stack(planes))


def eval_transform(
    img_size: tuple[int, int], interpolation: Interpolation, crop_pct: float, **options: Any
) -> Transform:
    """Resize and cut out the centre.

    Args:
        img_size: Height and width in pixels.
        interpolation: Interpolation of every resizing.
        crop_pct: The part of the resized image's side that is kept: 0.875 resizes to 256 and keeps 224.
        **options: For `timm.data.create_transform`.

    Returns:
        From an RGB image to float32 ``[3, H, W]``.
    """
    if not 0 < crop_pct <= 1:
        raise QsdError(f"crop_pct={crop_pct} is not a part of the image; choose above 0 and up to 1.")
    return _checked_transform(interpolation, input_size=(3, *img_size), crop_pct=crop_pct, **options)


def _checked_transform(interpolation: Interpolation, **options: Any) -> Any:
    for name in ("hflip", "re_prob"):
        if not 0 <= options.get(name, 0) <= 1:
            label = "random_erasing" if name == "re_prob" else name
            raise QsdError(f"{label}={options[name]} is not a probability; choose from 0 to 1.")
    if interpolation not in get_args(Interpolation):
        known = ", ".join(get_args(Interpolation))
        raise QsdError(f"interpolation={interpolation!r} is unknown; choose one of {known}.")
    policy = options.get("auto_augment")
    try:
        # timm passes over a section without a number, such as a mistyped "m-9".
        if policy and not all(
            section[:1] == "t" or any(map(str.isdigit, section)) for section in policy.split("-")[1:]
        ):
            raise ValueError("a section has no number")
        built = create_transform(interpolation=interpolation, **options)
    except (AssertionError, KeyError, ValueError) as error:
        reason = error or type(error).__name__
        raise QsdError(
            f"auto_augment={policy!r} is not understood by timm ({reason}); for example 'rand-m9-mstd0.5-inc1'."
        ) from error
    _mend_posterize(built)
    return built


def _mend_posterize(transform: Any) -> None:
    """Replace timm's posterization by `_posterize` in the policies of a transform, at any depth."""
    if isinstance(transform, list | tuple):
        for part in transform:
            _mend_posterize(part)
    elif getattr(transform, "aug_fn", None) is auto_augment.posterize:
        transform.aug_fn = _posterize
    else:
        for holder in ("transforms", "ops", "policy"):
            _mend_posterize(getattr(transform, holder, ()))


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    # timm's policies ask for 0 bits at their greatest magnitude: black up to Pillow 12, an error from 13 on.
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
