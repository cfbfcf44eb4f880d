"""Parameters that files of version 0.1.0 know under other names.

The table serves all readers: `rename_parameters` is called by the loading hook of `TransformerBlock`, so that torch,
Lightning and mmengine read old checkpoints, and by readers that compare names before they load. Optimizer states have
no names; they are matched through `present_name`.
"""

from collections.abc import MutableMapping
from typing import Any

# The end of a name in version 0.1.0, and what stands in its place today. Both belong to a transformer block.
RENAMED = {
    "layer_scale1": "attn.proj.layer_scale.gamma",
    "layer_scale2": "mlp.fc2.layer_scale.gamma",
}


def present_name(name: str) -> str:
    """The name that a parameter has today.

    Args:
        name: Dotted name in a file of this or of an earlier version.
    """
    parent, _, last = name.rpartition(".")
    renamed = RENAMED.get(last)
    if renamed is None:
        return name
    return f"{parent}.{renamed}" if parent else renamed


def former_name(name: str) -> str:
    """The name that a parameter has in files which every version reads: packed files keep those of version 0.1.0.

    Args:
        name: Dotted name of today.
    """
    former = next((old for old, new in RENAMED.items() if name == new or name.endswith(f".{new}")), None)
    return name if former is None else name.removesuffix(RENAMED[former]) + former


def rename_parameters(state: MutableMapping[str, Any], prefix: str = "") -> None:
    """Give the entries of a state dict their present names, in place.

    Args:
        state: State dict of a model or of a part of it.
        prefix: Only names that begin with it are renamed.
    """
    for name in [name for name in state if name.startswith(prefix)]:
        if (present := present_name(name)) != name:
            state[present] = state.pop(name)
