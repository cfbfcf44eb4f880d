"""Samplers whose order depends on the seed and the epoch alone.

Both derive from `torch.utils.data.DistributedSampler`, so that Lightning neither wraps nor replaces them, and tells the
training sampler the epoch.
"""

import logging
from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from qsd.errors import QsdError

logger = logging.getLogger(__name__)


def _world(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    running = dist.is_available() and dist.is_initialized()
    if num_replicas is None:
        num_replicas = dist.get_world_size() if running else 1
    if rank is None:
        rank = dist.get_rank() if running else 0
    return num_replicas, rank


class TrainSampler(DistributedSampler[Any]):
    """A new random order every epoch, a pure function of the seed and the epoch.

    Every process gets the same number of images. The remainder of an uneven division is left out, with other images in
    every epoch; only a data set smaller than the number of processes is repeated instead. The k-th batches of all
    processes together are a contiguous piece of the order: two processes with batch size 8 see the same images per step
    as one with 16.

    Args:
        dataset: Any object with a length.
        seed: At least 0.
        num_replicas: Number of processes; None asks torch.distributed (1 where that is not running).
        rank: This process; None asks torch.distributed.

    Attributes:
        skip: Images that the next iteration leaves out at the start of the epoch, to resume in the middle of it.
    """

    def __init__(self, dataset: Sized, seed: int = 0, num_replicas: int | None = None, rank: int | None = None) -> None:
        num_replicas, rank = _world(num_replicas, rank)
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.length = len(dataset)
        self.num_samples = max(1, self.length // num_replicas)
        self.total_size = self.num_samples * num_replicas
        self.skip = 0
        if rank == 0 and self.total_size != self.length:
            self._say_remainder()

    def _say_remainder(self) -> None:
        """Say how many images an epoch leaves out or repeats."""
        if self.total_size < self.length:
            level, number = logging.INFO, self.length - self.total_size
            what = "are left out of each epoch, other ones every time,"
        else:
            level, number, what = logging.WARNING, self.total_size - self.length, "are repeated in each epoch"
        logger.log(
            level,
            "%d of %d training images %s so that %d processes take equal steps.",
            number, self.length, what, self.num_replicas,
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield ``(epoch, index)``: the augmentation of an image depends on both."""
        epoch = self.epoch
        # RandomState's stream is frozen by numpy's compatibility policy; SeedSequence keeps (0, 1) apart from (1, 0).
        words = np.random.SeedSequence((self.seed, epoch)).generate_state(4)
        order = np.random.RandomState(words).permutation(self.length)
        shard = np.resize(order, self.total_size)[self.rank :: self.num_replicas]
        return iter([(epoch, index) for index in shard[self.skip :].tolist()])


class EvalSampler(DistributedSampler[Any]):
    """In order, every image exactly once over all processes.

    Process r of W gets the indices r, r + W, r + 2 W, ... The parts may differ in length by one, so that a metric does
    not depend on the number of processes.

    Args:
        dataset: Any object with a length.
        num_replicas: Number of processes; None asks torch.distributed (1 where that is not running).
        rank: This process; None asks torch.distributed.
    """

    def __init__(self, dataset: Sized, num_replicas: int | None = None, rank: int | None = None) -> None:
        num_replicas, rank = _world(num_replicas, rank)
        super().__init__(dataset, num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        if len(dataset) < num_replicas:
            # A process without a batch would miss the collective calls of the others, which then wait for ever.
            raise QsdError(
                f"{len(dataset)} image(s) cannot be evaluated by {num_replicas} processes, each needs at least one;"
                f" use --trainer.devices {max(1, len(dataset))} or more images."
            )
        self.indices = range(rank, len(dataset), num_replicas)
        self.num_samples = len(self.indices)
        self.total_size = len(dataset)

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of this process, ascending."""
        return iter(self.indices)
