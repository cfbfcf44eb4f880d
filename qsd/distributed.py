"""Waiting for the first of several processes while it works alone."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

# PyTorch's default of half an hour would end a long conversion while the other processes wait for it.
_TIMEOUT = timedelta(days=7)


def from_first_process(message: str | None) -> str | None:
    """Wait until the first process arrives here, and return its message in every process.

    Args:
        message: Message of this process; only that of the first process counts.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return message
    box = [message]
    group: Any = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]
