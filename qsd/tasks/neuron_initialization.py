"""Initialisation of the neurons' learned steps from the first batch of a training."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from qsd.training.neuron_initialization import initialize_from_batch


class NeuronInitialization(Callback):
    """Set the learned steps of neurons from the first training batch, unless the task's weights contain them."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Initialise once."""
        task: Any = pl_module
        if task.neurons_are_set:
            return
        task.neurons_are_set = True

        def average(step: Tensor) -> Tensor:
            reduced = trainer.strategy.reduce(step, reduce_op="mean")
            assert isinstance(reduced, Tensor)
            return reduced

        images = batch[0].contiguous(memory_format=torch.channels_last)
        initialize_from_batch(task.model, images, average if trainer.world_size > 1 else None)
