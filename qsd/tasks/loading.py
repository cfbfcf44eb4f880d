"""Tasks and trained networks from files."""

from pathlib import Path

from torch import nn

from qsd.errors import QsdError
from qsd.models.checkpoints import read_checkpoint
from qsd.packing import load_packed
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
    settings = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(settings, dict) or "model" not in settings:
        raise QsdError(
            f"{path} is no checkpoint of a training with qsd: it does not say which model its weights are of."
        )
    check_hyper_parameters(ClassificationTask, settings, path)
    try:
        # The weights are in the checkpoint: the file that the training started from is not opened again.
        return ClassificationTask.load_from_checkpoint(path, map_location="cpu", weights_only=True, init_from=None)
    except QsdError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
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
