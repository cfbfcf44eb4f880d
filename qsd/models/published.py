"""How a family's published code names and shapes its tensors, for the reading of its checkpoints."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qsd.errors import QsdError

StateDict = Mapping[str, Tensor]
# A pattern and its replacement, a text or a function of the match.
Renaming = tuple[str, Any]


@dataclass(frozen=True)
class PublishedCode:
    """The published code of a family.

    Attributes:
        title: Name of the code in prose.
        matches: Whether a state dict without wrappings is one of this code.
        convert: Gives such a state dict the names and shapes of qsd.
        sizes: The arguments of the family's class that follow from such a state dict, ``num_classes`` among them.
        default: Variant whose arguments are overridden where no variant has the sizes of a checkpoint.
        arguments: Arguments of the published network that leave no trace in its tensors.
    """

    title: str
    matches: Callable[[StateDict], bool]
    convert: Callable[[StateDict], dict[str, Tensor]]
    sizes: Callable[[StateDict], dict[str, Any]]
    default: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def renamed(name: str, renamings: Iterable[Renaming]) -> str:
    """A name after all replacements, in their order.

    Args:
        name: Name in the published code.
        renamings: Patterns and replacements.
    """
    for pattern, replacement in renamings:
        name = re.sub(pattern, replacement, name)
    return name


def with_two_sides(name: str, tensor: Tensor) -> Tensor:
    """The weight of a 1-D convolution as that of a 2-D convolution; any other tensor as it is.

    Args:
        name: Name of the tensor.
        tensor: The tensor.
    """
    return tensor.unsqueeze(-1) if name.endswith(".weight") and tensor.dim() == 3 else tensor


def stage_sizes(state: StateDict, stages: Iterable[str]) -> dict[str, Any]:
    """Sizes of a network of stages, as the codes of QSD-Transformer and of E-SpikeFormer name them.

    Args:
        state: State dict of the published code.
        stages: Names of the down-samplings, that of the stem first.

    Returns:
        ``embed_dims``, ``depth``, ``in_chans`` and ``num_classes``. The number of heads does not follow from tensors.

    Raises:
        QsdError: If tensors are missing.
    """
    names = [f"{name}.encode_conv.weight" for name in stages]
    missing = [name for name in names if name not in state]
    if missing:
        raise QsdError(f"the checkpoint of the published code is incomplete: {shortened(missing)} missing.")
    return {
        "embed_dims": tuple(state[name].shape[0] for name in names[1:]),
        "depth": len({match[0] for name in state if (match := re.match(r"block[34]\.\d+", name))}),
        "in_chans": state[names[0]].shape[1],
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
    }


def steps_in_name(source: str | Path) -> int | None:
    """The time steps that the name of a published file tells, as in ``V3_19.0M_1x4.pth``, or ``None``.

    Args:
        source: Path of a file.
    """
    found = re.search(r"(?<!\d)1x(\d+)(?!\d)", Path(source).name)
    return None if found is None else int(found[1])


def shortened(names: Iterable[str], limit: int = 3) -> str:
    """The first names of a list, and the number of the others.

    Args:
        names: Names, for a message.
        limit: Number of names that are written out.
    """
    names = list(names)
    rest = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
