"""Taking a task out of a checkpoint."""

from pathlib import Path

from qsd.errors import QsdError
from qsd.models.checkpoints import read_checkpoint
from qsd.tasks.classification import ClassificationTask


def load_task(path: str | Path) -> ClassificationTask:
    """The task of a training's checkpoint, with its network; with weight averaging, of the averaged weights.

    Args:
        path: ``.ckpt`` file that a training of ours wrote, or ``tools/import_checkpoint.py``.

    Raises:
        QsdError: if the file cannot be read or is something else.
    """
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict) or "model" not in checkpoint.get("hyper_parameters", {}):
        raise QsdError(
            f"{path} is no checkpoint of a training with qsd: it does not say which model its weights are of."
        )
    try:
        return ClassificationTask.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except QsdError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise QsdError(f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
