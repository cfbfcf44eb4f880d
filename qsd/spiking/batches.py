"""Images to measure on: a tensor, or the batches of a data loader."""

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from qsd.errors import QsdError

Images = Tensor | Iterable[Any]


def image_batches(
    data: Images, network: nn.Module, max_images: int | None = None, progress: str | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of images ``[B, C, H, W]``, on the network's device and in its type, and their labels ``[B]`` if known.

    Args:
        data: Images, one batch of them, or an iterable (a data loader) of tensors, or of tuples or lists that begin
            with images and perhaps labels.
        network: Network whose buffers or parameters tell device and type.
        max_images: Largest number of images.
        progress: Title of a progress bar, or ``None`` for none.

    Raises:
        QsdError: If there are no images, or a batch does not begin with a tensor.
    """
    like = next((t for t in [*network.parameters(), *network.buffers()] if t.is_floating_point()), torch.empty(0))
    seen = 0
    batches: Iterable[Any] = [data] if isinstance(data, Tensor) else data
    if progress is not None:
        total = len(batches) if isinstance(batches, Sized) else None
        batches = track(batches, progress, total=total, transient=True)
    for batch in batches:
        parts = batch if isinstance(batch, tuple | list) else (batch,)
        images, labels = parts[0], parts[1] if len(parts) > 1 and isinstance(parts[1], Tensor) else None
        if not isinstance(images, Tensor):
            raise QsdError(f"a batch begins with a {type(images).__name__}; give images, or (images, labels).")
        room = len(images) if max_images is None else max_images - seen
        if room <= 0:
            break
        seen += len(images[:room])
        yield images[:room].to(like.device, like.dtype), None if labels is None else labels[:room].to(like.device)
    if not seen:
        raise QsdError("there are no images to measure on; give at least one.")
