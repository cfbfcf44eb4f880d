"""Random states in checkpoints: as tensors and plain numbers, which load without running code."""

import os
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

_KEY, _SEED = "random_states", "random_seed"  # Of checkpoints.


class RandomStates(Callback):
    """Store the random states of all processes in checkpoints, and restore them when the training goes on.

    A training that goes on with another ``seed_everything`` keeps the states that this seed gives.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states of all processes."""
        states: list[Any] = [get_random_state(pl_module.device)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, get_random_state(pl_module.device))
        checkpoint[_KEY] = states
        checkpoint[_SEED] = os.environ.get("PL_GLOBAL_SEED")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the states until the first batch."""
        before, seed = checkpoint.get(_SEED), os.environ.get("PL_GLOBAL_SEED")
        self._states = checkpoint.get(_KEY) if before == seed or None in (before, seed) else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the state of this process, right before the first operation that may draw from it."""
        states, self._states = self._states, None
        if states is not None and trainer.global_rank < len(states):
            set_random_state(states[trainer.global_rank])


def get_random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators.

    Args:
        device: Device of the training. The generator of a CUDA device is included.
    """
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - Mixup draws from it
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states of the global generators.

    Args:
        state: States from `get_random_state`.
    """
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
