"""Small classification trainings, whole and interrupted."""

import os
import signal

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback

from qsd.data import DigitsData, ImageArray
from qsd.tasks import ClassificationTask

SMALL = {"embed_dims": (8, 8, 8, 8), "num_heads": 2, "depth": 3, "strides": (1, 2, 2, 2, 1), "layer_scale": 0.5}


class FewDigits(DigitsData):
    """Twenty training images, eight for validation."""

    def __init__(self, batch_size=8, **kwargs):
        super().__init__(img_size=16, batch_size=batch_size, **kwargs)

    def load_part(self, part):
        source, count = super().load_part(part), 20 if part == "train" else 8
        images = np.stack([np.asarray(source.load(i)) for i in range(count)])
        return ImageArray(images, source.labels[:count], [str(i) for i in range(count)])


def make_task(**kwargs):
    arguments = {"optimizer": "adamw", "base_lr": 0.05, "warmup_epochs": 1, **kwargs}
    arguments["model_args"] = {**SMALL, **arguments.get("model_args", {})}
    return ClassificationTask("qsd_tiny", **arguments)


def make_trainer(folder, callbacks=(), **kwargs):
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=kwargs.pop("logger", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, **kwargs},
    )


class Interrupted(Exception):
    pass


class InterruptAfter(Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.steps:
            raise Interrupted


class PressCtrlC(Callback):
    """Ctrl-C in the first batch."""

    def on_train_batch_start(self, trainer, *_):
        raise KeyboardInterrupt


class Terminate(Callback):
    """SIGTERM to this process in the first batch, which Lightning notices at its end."""

    def on_train_batch_start(self, trainer, *_):
        os.kill(os.getpid(), signal.SIGTERM)
