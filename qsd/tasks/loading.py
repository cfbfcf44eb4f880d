"""Tasks and trained networks from files."""

import inspect
from pathlib import Path

from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.models.checkpoints import read_checkpoint
from qsd.models.registered import check_size, model_of_file
from qsd.packing import load_packed
from qsd.reading import part_of
from qsd.spiking import SpikingNetwork
from qsd.tasks.classification import ClassificationTask
from qsd.tasks.hyper_parameters import check_hyper_parameters


def load_task(path: str | Path) -> ClassificationTask:
    """The task of a training's checkpoint, with its network; with weight averaging, it has the averaged weights.

    Args:
        path: A ``.ckpt`` file of a training with qsd, or of ``qsd import-checkpoint``.

    Raises:
        QsdError: If the file cannot be read or is something else.
    """
    checkpoint = read_checkpoint(path)
    saved = part_of(checkpoint, "hyper_parameters", dict, path, {})
    if "model" not in saved:
        raise QsdError(
            f"{path} is no checkpoint of a training with qsd: it does not say which model its weights are of."
        )
    state = part_of(checkpoint, "state_dict", dict, path)
    name, arguments = model_of_file(str(path), saved["model"], saved.get("model_args"))
    other = next((key for key, value in state.items() if not isinstance(value, Tensor)), None)
    if other is not None or not state:
        found = f"a {type(state[other]).__name__} named {other!r}" if state else "nothing"
        raise QsdError(f"{path} has {found} in its state_dict, where tensors belong.")
    classes = {"num_classes": saved["num_classes"]} if isinstance(saved.get("num_classes"), int) else {}
    check_size(str(path), name, {**classes, **arguments}, state)
    check_hyper_parameters(ClassificationTask, saved, path)
    known = inspect.signature(ClassificationTask).parameters
    settings = {key: value for key, value in saved.items() if key in known}
    settings |= {"model": name, "model_args": arguments, "init_from": None}  # weights come from this file alone
    try:
        task = ClassificationTask(**settings)
        task.configure_model()
        task.on_load_checkpoint(checkpoint)
        task.load_state_dict(checkpoint["state_dict"])
        return task
    except QsdError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise QsdError(f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def load_trained(path: str | Path) -> tuple[nn.Module, str]:
    """The trained network of a checkpoint or a packed file, and its model's name.

    Args:
        path: ``.ckpt`` of a training, or a packed ``.safetensors`` file.

    Raises:
        QsdError: If the file cannot be read, is something else, or holds a model that timm does not know.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        task = load_task(path)
        return task.model, task.hparams["model"]
    network = load_packed(path)
    if isinstance(network, SpikingNetwork):
        network = network.trained.build()
    return network, network.registered["name"]
