"""Files that version 0.1.0 wrote (see tests/data/v0_1_0/README.md), and the order of its optimizer states."""

import lzma
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "data" / "v0_1_0"
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def unpacked(name, folder):
    """The decompressed copy of a file in a folder."""
    path = Path(folder) / name
    path.write_bytes(lzma.decompress((FOLDER / f"{name}.xz").read_bytes()))
    return path


def parameters(state_dict):
    """Parameters in the order in which version 0.1.0 passed them to its optimizer."""
    return {name: tensor for name, tensor in state_dict.items() if not name.endswith(BUFFERS)}


def moments(groups, state):
    """First moment by name, for groups of names in the order of an optimizer's state."""
    names = [name for group in groups for name in group]
    assert len(names) == len(state["state"])
    return {name: state["state"][index]["exp_avg"] for index, name in enumerate(names)}


def present(name):
    """Where version 0.1.0 had a block's parameter `layer_scale1`, its chain has a layer now."""
    return name.replace("layer_scale1", "attn.proj.layer_scale.gamma").replace(
        "layer_scale2", "mlp.fc2.layer_scale.gamma"
    )
