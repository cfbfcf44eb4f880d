"""Models that a file names: built from timm's registry alone, without any further file or address."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import is_model
from torch import Tensor

from qsd.errors import QsdError

# Arguments of timm that name weights elsewhere. A file that is read brings its own weights along.
WEIGHT_ARGUMENTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
_LARGEST = 1 << 24  # of a number among the arguments; sizes of networks are far smaller
_SMALL = 1 << 20  # numbers of a network that is built in any case


def model_of_file(source: str, name: Any, arguments: Any) -> tuple[str, dict[str, Any]]:
    """Check a model's name and arguments that a file tells.

    Args:
        source: The file, for messages.
        name: Name of a model.
        arguments: Arguments of the model, by name, or ``None``.

    Returns:
        The name, and the arguments without those that name weights in other files.

    Raises:
        QsdError: If timm's registry does not hold the name (an address, say), or an argument is no plain value.
    """
    if not isinstance(name, str) or not is_model(name):
        raise QsdError(
            f"{source} names the model {str(name)[:80]!r}, which is not registered with timm here; addresses in files "
            "are not followed. Import the package that registers it."
        )
    if arguments is None:
        return name, {}
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise QsdError(f"{source} has arguments of its model that are no dictionary of names.")
    for key, value in arguments.items():
        if not _is_plain(value):
            raise QsdError(f"{source} has the argument {key}={str(value)[:60]} of its model, which is no plain value.")
    return name, {key: value for key, value in arguments.items() if key not in WEIGHT_ARGUMENTS}


def check_size(source: str, name: str, arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse a model of a size that the tensors of its file cannot have, before memory is allocated for it.

    Args:
        source: The file, for messages.
        name: Name of the model.
        arguments: Arguments of the model.
        state: Tensors of the file.

    Raises:
        QsdError: For a depth beyond the number of tensors, any other size beyond their largest one, or a model of
            more than twice as many numbers.
    """
    largest = max((size for tensor in state.values() for size in (*tensor.shape, tensor.numel())), default=0)
    for key, value in arguments.items():
        numbers = [n for n in _numbers(value) if isinstance(n, int)]
        limit = len(state) if "depth" in key else max(largest, 4096)
        if any(number > limit for number in numbers):
            raise QsdError(
                f"{source} has the argument {key}={value} of its model, which its {len(state)} tensors rule out."
            )
    try:
        with torch.device("meta"):
            network = timm.create_model(name, **arguments)
    except Exception:  # Building it for use tells why.
        return
    needed = sum(tensor.numel() for tensor in network.state_dict().values())
    stored = sum(tensor.numel() for tensor in state.values())
    if needed > 2 * stored + _SMALL:
        raise QsdError(f"{source} names the model {name!r} of {needed} numbers, and holds {stored}; it is damaged.")


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [number for item in value.values() for number in _numbers(item)]
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int | float) else []


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return not abs(value) > _LARGEST
    return value is None or isinstance(value, str | bool | torch.Size)
