"""Data loaders that skip or report unreadable images, and that resume in the middle of an epoch."""

import logging
import weakref
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from qsd.data.dataset import ImageDataset, Sample
from qsd.data.sampling import TrainSampler
from qsd.errors import QsdError
from qsd.reading.files import shown
from qsd.reading.images import BadImage
from qsd.stopping import outlast_stop_signals

logger = logging.getLogger(__name__)

WORKER_ENDED = (
    "a data-loading process was ended by the system, most likely for lack of memory; lower --data.num_workers or "
    "--data.batch_size"
)

Batch = tuple[Tensor, Tensor | list[str]]
"""Images ``[B, C, H, W]`` and their labels ``[B]`` or names."""

_CollatedBatch = tuple[Tensor | None, Tensor | list[str], list[BadImage]]


def collate(samples: list[Sample]) -> _CollatedBatch:
    """Stack the images that could be read, and gather the others.

    Args:
        samples: At least one.

    Returns:
        Images ``[B, C, H, W]`` or None where none could be read, labels ``[B]`` or names, and what could not be read.
    """
    bad = [image for sample in samples for image in sample.bad]
    good = [sample for sample in samples if sample.image is not None]
    if not good:
        return None, [], bad
    images, targets = default_collate([(sample.image, sample.target) for sample in good])
    return images, list(targets) if isinstance(targets, tuple) else targets, bad


class BadImagePolicy:
    """Treatment of images that cannot be read, and a list of them.

    Args:
        action: ``"error"`` raises at the first one; ``"skip"`` goes on and reports.

    Attributes:
        reasons: Reasons by path of the images that were skipped so far.
    """

    def __init__(self, action: Literal["error", "skip"] = "error") -> None:
        if action not in ("error", "skip"):
            raise QsdError(f"on_bad_image={action!r} is unknown; choose 'error' or 'skip'.")
        self.action = action
        self.reasons: dict[str, str] = {}
        self._reported = 0

    def meet(self, bad: list[BadImage]) -> None:
        """Raise an error, or remember the images.

        Args:
            bad: Images that could not be read.
        """
        if bad and self.action == "error":
            path, reason = bad[0]
            raise QsdError(
                f"cannot read the image {shown(path)}: {reason}; repair or remove it, or --data.on_bad_image skip."
            )
        self.reasons.update(bad)

    def report(self) -> None:
        """Warn about the images skipped since the last report."""
        new = list(self.reasons.items())[self._reported :]
        if not new:
            return
        self._reported = len(self.reasons)
        examples = ", ".join(f"{shown(path)} ({reason})" for path, reason in new[:3])
        more = f" and {len(new) - 3} more" if len(new) > 3 else ""
        logger.warning("skipped %d image(s) that cannot be read: %s%s", len(new), examples, more)

    def all_bad(self) -> NoReturn:
        """Raise an error because no image can be read."""
        self._reported = len(self.reasons)
        path, reason = next(iter(self.reasons.items()))
        raise QsdError(f"none of {len(self.reasons)} images can be read; the first is {shown(path)}: {reason}.")


# The queues of the data-loading processes, by the identity of the iterator that they belong to.
_QUEUES: dict[int, list[Any]] = {}


def _keep_queues(batches: Any) -> None:
    """Let the queues to data-loading processes outlast their iterator.

    The garbage collector closes the queues of a cycle before it ends the iterator. The processes could then not be told
    to stop, and PyTorch would wait five seconds for each of them.
    """
    if id(batches) not in _QUEUES and hasattr(batches, "_index_queues"):
        _QUEUES[id(batches)] = batches._index_queues
        weakref.finalize(batches, _QUEUES.pop, id(batches))


class ImageLoader(DataLoader[Sample]):
    """Yields `Batch`; nothing is drawn from the sampler before the first batch is asked for.

    Lightning makes the iterator before it tells the sampler the epoch, so it must not begin any earlier. The loader
    draws its workers' seeds from a generator of its own: making an iterator leaves torch's global generator alone.

    Args:
        dataset: The images.
        bad_images: Treatment of images that cannot be read, shared by the loaders of one data module.
        **kwargs: As for `torch.utils.data.DataLoader`.
    """

    dataset: ImageDataset

    def __init__(self, dataset: ImageDataset, *, bad_images: BadImagePolicy, **kwargs: Any) -> None:
        # Defaults and not fixed, because Lightning copies a loader from all of its attributes.
        kwargs.setdefault("collate_fn", collate)
        kwargs.setdefault("generator", torch.Generator())
        kwargs.setdefault("worker_init_fn", outlast_stop_signals)
        super().__init__(dataset, **kwargs)
        self.bad_images = bad_images

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches of one epoch; one in which nothing could be read is left out."""
        return self._read(done=0)

    def _read(self, done: int) -> Iterator[Batch]:
        any_read, batches = False, super().__iter__()
        _keep_queues(batches)
        try:
            for number, (images, targets, bad) in enumerate(batches, start=done + 1):
                self.bad_images.meet(bad)
                if number == len(self):
                    self.bad_images.report()  # Now, because Lightning never asks for more than the last batch.
                if images is not None:
                    any_read = True
                    yield images, targets
                elif self.dataset.replace_bad:
                    self.bad_images.all_bad()  # There was no readable image to put in place of any.
            if not any_read:
                self.bad_images.all_bad()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise QsdError(WORKER_ENDED) from error
        finally:
            self.bad_images.report()


class TrainLoader(ImageLoader):
    """Resumes in the middle of an epoch, with the batch that would have come next.

    Lightning stores `state_dict` in its checkpoints, and restores it before the first batch.

    Args:
        dataset: The images.
        bad_images: Treatment of images that cannot be read.
        order_before: `order` of the training that is resumed, if there is one and it is known.
        **kwargs: As for `torch.utils.data.DataLoader`; ``sampler`` is a `TrainSampler`.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        bad_images: BadImagePolicy,
        order_before: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, bad_images=bad_images, **kwargs)
        self.order_before = dict(order_before or {})
        self._state = {"epoch": 0, "batches": 0}
        self._resuming = False

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration continue the epoch of the state, if it is of that epoch and batches are left.

        Args:
            state: From `state_dict`.
        """
        self._state = dict(state)
        self._resuming = True

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the remaining batches of an epoch that is being resumed, else all of the epoch."""
        for batch in self._read(done=self._begin_epoch()):
            self._state["batches"] += 1
            yield batch

    def _begin_epoch(self) -> int:
        sampler = self.sampler
        if not isinstance(sampler, TrainSampler):
            return 0  # Lightning's `overfit_batches` has put a sampler without epochs here.
        state = self._state
        done = state["batches"] if self._resuming and state["epoch"] == sampler.epoch else 0
        if done >= self.order_before.get("length", len(self)):
            done = 0  # The checkpoint was written after the last batch.
        if done:
            self._check_order(state["epoch"])
        self._resuming = False
        self._state = {"epoch": sampler.epoch, "batches": done}
        sampler.skip = done * (self.batch_size or 1)
        return done

    def order(self) -> dict[str, int]:
        """What decides which images are in a batch."""
        sampler = self.sampler
        if not isinstance(sampler, TrainSampler):
            return {}
        return {
            "length": len(self),
            "batch_size": self.batch_size or 1,
            "processes": sampler.num_replicas,
            "images": sampler.length,
            "labels": zlib.crc32(self.dataset.source.labels.tobytes()),
            "seed": sampler.seed,
        }

    def _check_order(self, epoch: int) -> None:
        """Refuse to go on within an epoch whose remaining batches would repeat images or leave some out."""
        for name, value in self.order().items():
            before = self.order_before.get(name, value)
            if before != value and name != "length":
                difference = "other labels" if name == "labels" else f"{name}={value} instead of {before}"
                raise QsdError(
                    f"the checkpoint is from within epoch {epoch}, which cannot go on with {difference}: images would "
                    "be repeated or left out; keep this setting, or resume from a checkpoint of the end of an epoch."
                )
