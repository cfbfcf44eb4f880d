"""Random states as checkpoints can hold them: tensors and plain numbers, which load without running code."""

import random
from typing import Any

import numpy as np
import torch


def get_random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators.

    Args:
        device: whose generator is included beside the CPU's, if it is a CUDA device.
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
    """Put the global generators into a recorded state.

    Args:
        state: what `get_random_state` returned.
    """
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
