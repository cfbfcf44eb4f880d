"""Turn a checkpoint of the published code of QSD-Transformer or E-SpikeFormer into one that --ckpt_path accepts.

Example:
  qsd import-checkpoint reference.pth imported.ckpt
  qsd import-checkpoint hf-hub:OWNER/NAME/FILE imported.ckpt
"""

import inspect
from collections.abc import Mapping, Sequence
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
from qsd.models.checkpoints import published_code, read_state_dict
from qsd.models.fetching import local_file
from qsd.models.published import PublishedCode, steps_in_name
from qsd.models.variants import Family, family_of


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
    parser.add_argument(
        "source", help=".pth file of the published code, or its address: hf-hub:OWNER/NAME/FILE, https://..."
    )
    parser.add_argument("target", type=Path, help=".ckpt file to write")
    parser.add_argument("--num-heads", type=whole(1), default=8, help="number of attention heads (published: 8)")
    parser.add_argument(
        "--weight-bits", type=whole(0, 8), help="bits of the weights, 0 for floats (default: as published)"
    )
    parser.add_argument(
        "--time-steps", type=whole(1, 255), help="T (default: as the file's name tells, 1x4 or 1x8, else 4)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    options = parser.parse_args(args)
    name = import_checkpoint(
        options.source, options.target, options.num_heads, options.weight_bits, options.force, options.time_steps
    )
    print(f"{options.target}: {name}; use it with --ckpt_path (as it is) or --model.init_from (to start a training)")


def import_checkpoint(
    source: str | Path,
    target: Path,
    num_heads: int = 8,
    weight_bits: int | None = None,
    force: bool = False,
    time_steps: int | None = None,
) -> str:
    """Write a Lightning checkpoint at the start of its training.

    Args:
        source: The ``.pth`` file of the published code, or its address.
        target: The ``.ckpt`` file to write.
        num_heads: The number of attention heads, which a checkpoint does not hold (published: 8).
        weight_bits: The bits of the weights, which a checkpoint does not hold either; ``None`` for the published ones
            (QSD-Transformer: 4, E-SpikeFormer: 0, which means floats).
        force: Whether to replace an existing target.
        time_steps: T, which a checkpoint does not hold either; ``None`` for the number in the name of the source, as
            in ``V3_19.0M_1x4.pth``, or else the model's own.

    Returns:
        The name of the registered model that has these sizes.

    Raises:
        QsdError: If the source cannot be read or is no such checkpoint, or the target exists.
    """
    program.refuse_existing([target], force)
    state = read_state_dict(local_file(source))
    code = published_code(state, source)
    sizes = code.sizes(state)
    num_classes = sizes.pop("num_classes")
    if num_classes == 0:
        raise QsdError(f"{source} has no classifier; start from it with --model.init_from {source} instead.")
    if not target.parent.is_dir():
        raise QsdError(f"the folder {target.parent} does not exist; make it first.")
    name = _registered_name(code, sizes)
    arguments = {**sizes, **code.arguments, "embed_dims": list(sizes["embed_dims"]), "num_heads": num_heads}
    steps = steps_in_name(source) if time_steps is None else time_steps
    for key, value in (("weight_bits", weight_bits), ("time_steps", steps)):
        if value is not None:
            arguments[key] = value
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


def _registered_name(code: PublishedCode, sizes: Mapping[str, Any]) -> str:
    """The registered model of these sizes, or the code's default one, whose sizes are then overridden."""
    family = family_of(code.default)
    wanted = (sizes["embed_dims"], sizes["depth"])
    same = (
        name for name in family.sizes if (_size(family, name, "embed_dims"), _size(family, name, "depth")) == wanted
    )
    return next(same, code.default)


def _size(family: Family, name: str, key: str) -> Any:
    """An argument of a variant, or the default of its class."""
    return family.sizes[name].get(key, inspect.signature(family.cls).parameters[key].default)
