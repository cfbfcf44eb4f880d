"""The option ``--device``."""

import torch

from qsd.limits import BadValue


def device_name(text: str) -> str:
    """The type of an argument of a parser: a device that exists here.

    Args:
        text: ``cpu``, ``cuda``, ``cuda:1``, and so on.
    """
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise BadValue(f"the device {text!r} is unknown; use cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index is not None and count <= device.index) or not count:
            raise BadValue(f"the device {text!r} does not exist here; there are {count} CUDA devices")
    elif device.type not in ("cpu", "mps") or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise BadValue(f"the device {text!r} is not supported here; use cpu or cuda")
    return text
