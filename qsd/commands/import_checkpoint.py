"""Turn a checkpoint of the published QSD-Transformer code into one that --ckpt_path of qsd accepts.

Example:
  qsd import-checkpoint reference.pth imported.ckpt
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
from torch import nn

from qsd import load_reference_weights, program
from qsd.errors import QsdError
from qsd.files import replacing
from qsd.limits import whole
from qsd.models.checkpoints import read_state_dict
from qsd.models.reference import is_reference, reference_sizes
from qsd.models.variants import QSD_VARIANTS


def main(args: Sequence[str] | None = None) -> int:
    """Run ``qsd import-checkpoint``.

    Args:
        args: The arguments; ``None`` for those of the process.

    Returns:
        The exit code, as of `qsd.program.run`.
    """
    return program.run("qsd", _command, args)


def _command(args: list[str]) -> None:
    parser = program.Parser(prog="qsd import-checkpoint", description=__doc__)
    parser.add_argument("source", type=Path, help=".pth file of the published code")
    parser.add_argument("target", type=Path, help=".ckpt file to write")
    parser.add_argument("--num-heads", type=whole(1), default=8, help="number of attention heads (published: 8)")
    parser.add_argument("--weight-bits", type=whole(2, 8), default=4, help="bits of the weights (published: 4)")
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    options = parser.parse_args(args)
    name = import_checkpoint(options.source, options.target, options.num_heads, options.weight_bits, options.force)
    print(f"{options.target}: {name}; use it with --ckpt_path (as it is) or --model.init_from (to start a training)")


def import_checkpoint(source: Path, target: Path, num_heads: int = 8, weight_bits: int = 4, force: bool = False) -> str:
    """Write a Lightning checkpoint at the start of its training.

    Args:
        source: The ``.pth`` file of the published code.
        target: The ``.ckpt`` file to write.
        num_heads: The number of attention heads, which a checkpoint does not hold (published: 8).
        weight_bits: The bits of the weights, which a checkpoint does not hold either (published: 4).
        force: Whether to replace an existing target.

    Returns:
        The name of the registered model that has these sizes.

    Raises:
        QsdError: If the source cannot be read or is no such checkpoint, or the target exists.
    """
    program.refuse_existing([target], force)
    state = read_state_dict(source)
    if not is_reference(state):
        raise QsdError(f"{source} is no checkpoint of the published QSD-Transformer code.")
    sizes = reference_sizes(state)
    num_classes = sizes.pop("num_classes")
    if num_classes == 0:
        raise QsdError(f"{source} has no classifier; start from it with --model.init_from {source} instead.")
    if not target.parent.is_dir():
        raise QsdError(f"the folder {target.parent} does not exist; make it first.")
    name = _registered_name(sizes)
    arguments = {**sizes, "embed_dims": list(sizes["embed_dims"]), "num_heads": num_heads, "weight_bits": weight_bits}
    model = timm.create_model(name, num_classes=num_classes, **arguments)
    load_reference_weights(model, state)
    _write_checkpoint(target, name, arguments, num_classes, model)
    return name


def _write_checkpoint(target: Path, name: str, arguments: dict[str, Any], num_classes: int, model: nn.Module) -> None:
    checkpoint = {
        "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
        "hyper_parameters": {
            "_class_path": "qsd.tasks.ClassificationTask",
            "model": name,
            "model_args": arguments,
            "num_classes": num_classes,
        },
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": 0,
        # Empty, so that a training starts with a fresh optimizer and schedule of its own configuration.
        "optimizer_states": [],
        "lr_schedulers": [],
        "callbacks": {},
    }
    with replacing(target) as partial:
        torch.save(checkpoint, partial)


def _registered_name(sizes: dict[str, Any]) -> str:
    """The registered model of these sizes, or the 15 M one, whose sizes are then overridden."""
    wanted = (sizes["embed_dims"], sizes["depth"])
    same = (name for name, row in QSD_VARIANTS.items() if (row["embed_dims"], row.get("depth", 8)) == wanted)
    return next(same, "qsd_15m")
