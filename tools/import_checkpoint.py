"""Turn a checkpoint of the published QSD-Transformer code into one that ``qsd fit/validate/test --ckpt_path`` accepts.

python tools/import_checkpoint.py reference.pth imported.ckpt
"""

import argparse
import sys
from pathlib import Path

import lightning
import timm
import torch

from qsd import QsdError, load_reference_weights
from qsd.models.checkpoints import read_state_dict
from qsd.models.reference import is_reference, reference_sizes
from qsd.models.variants import QSD_VARIANTS


def import_checkpoint(source: Path, target: Path, num_heads: int = 8, weight_bits: int = 4, force: bool = False) -> str:
    """Write ``target``, a Lightning checkpoint at the start of its training.

    Args:
        source: ``.pth`` file of the published code.
        target: ``.ckpt`` file to write.
        num_heads: attention heads, which a checkpoint does not reveal (published: 8).
        weight_bits: bits of its weights, which it does not reveal either (published: 4).
        force: replace an existing target.

    Returns:
        The name of the registered model that the sizes belong to.

    Raises:
        QsdError: if the source cannot be read or is something else, or the target exists.
    """
    if target.exists() and not force:
        raise QsdError(f"{target} exists; pass --force to replace it.")
    state = read_state_dict(source)
    if not is_reference(state):
        raise QsdError(f"{source} is no checkpoint of the published QSD-Transformer code.")
    sizes = reference_sizes(state)
    num_classes = sizes.pop("num_classes")
    if num_classes == 0:
        raise QsdError(f"{source} has no classifier; start from it with --model.init_from {source} instead.")
    if not target.parent.is_dir():
        raise QsdError(f"the folder {target.parent} does not exist; make it first.")
    same = (name for name, row in QSD_VARIANTS.items() if (row["embed_dims"], row.get("depth", 8)) == _key(sizes))
    name = next(same, "qsd_15m")
    arguments = {**sizes, "embed_dims": list(sizes["embed_dims"]), "num_heads": num_heads, "weight_bits": weight_bits}
    model = timm.create_model(name, num_classes=num_classes, **arguments)
    load_reference_weights(model, state)
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
        # Empty, so that a fit starts with a fresh optimiser and schedule of its own configuration.
        "optimizer_states": [],
        "lr_schedulers": [],
        "callbacks": {},
    }
    partial = target.with_suffix(".part")
    torch.save(checkpoint, partial)
    partial.replace(target)
    return name


def _key(sizes: dict) -> tuple:
    return sizes["embed_dims"], sizes["depth"]


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help=".pth file of the published code")
    parser.add_argument("target", type=Path, help=".ckpt file to write")
    parser.add_argument("--num-heads", type=int, default=8, help="attention heads (published: 8)")
    parser.add_argument("--weight-bits", type=int, default=4, help="bits of the weights (published: 4)")
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    options = parser.parse_args(args)
    try:
        name = import_checkpoint(options.source, options.target, options.num_heads, options.weight_bits, options.force)
    except (QsdError, OSError) as error:
        print(f"import_checkpoint: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.target}: {name}; use it with --ckpt_path (as it is) or --model.init_from (to start a training)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
