"""A training of milliseconds: a linear classifier of a few digits, with all that resuming needs."""

import os
import signal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from qsd.data import DigitsData, ImageArray
from qsd.runs import SaveOnStop
from qsd.tasks.resuming import Resuming


class Digits(DigitsData):
    """Training images of 8x8 pixels in batches of 4, and some for validation."""

    def __init__(self, images=14, batch_size=4, seed=3, num_workers=0):
        super().__init__(img_size=8, batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.images = images

    def load_part(self, part):
        source, count = super().load_part(part), self.images if part == "train" else 8
        images = np.stack([np.asarray(source.load(index)) for index in range(count)])
        return ImageArray(images, source.labels[:count], [str(index) for index in range(count)])


class Linear(L.LightningModule):
    """Logs ``val``, the loss on the validation images, unless ``scores`` are given, one for each validation."""

    def __init__(self, scores=()):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 10)
        self.scores = scores

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch):
        loss = torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])
        self.log("val", self.scores[self.current_epoch] if self.scores else loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Send(Callback):
    """Sends a signal to this process, in a batch of an epoch of the training, or of the validation."""

    def __init__(self, epoch, batch=0, validation=False, number=signal.SIGTERM):
        self.place, self.validation, self.number = (epoch, batch), validation, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.validation and (trainer.current_epoch, batch_idx) == self.place:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        here = (trainer.current_epoch, batch_idx)
        if self.validation and not trainer.sanity_checking and here == self.place:
            os.kill(os.getpid(), self.number)


def fit(folder, *callbacks, resume=None, module=None, data=None, watch=None, **options):
    """Train in a folder, with checkpoints ``best`` and ``last``.

    ``watch`` answers signals. Returns the module, whose trainer is attached.
    """
    folder.mkdir(exist_ok=True, parents=True)
    checkpoints = [
        ModelCheckpoint(folder / "checkpoints", "best", monitor="val"),
        ModelCheckpoint(folder / "checkpoints", "last", enable_version_counter=False),
    ]
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Resuming(), *callbacks, watch or SaveOnStop(), *checkpoints],
        **{"max_epochs": 3, **options},
    )
    module = module or Linear()
    trainer.fit(module, data or Digits(), ckpt_path=resume)
    return module
