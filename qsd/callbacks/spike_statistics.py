"""Firing rates and entropies of attention during training with Lightning."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from qsd.limits import check_number
from qsd.training.spike_meter import SpikeMeter


class SpikeStatistics(Callback):
    """Log firing rates, and the entropy of attention's spike counts, on the first batches of each validation.

    Logged: ``spikes/rate``, spikes per neuron and time step over the whole network; ``spikes/rate/<neuron>`` by layer;
    ``spikes/entropy/<attention>.q_neuron`` (and ``k``, ``v``), the counts' entropy in bits, at most ``log2(T + 1)``.
    `qsd.information` measures more of a checkpoint. A compiled network runs uncompiled where it is measured.

    Args:
        batches: Number of batches of the validation data to measure, per process.
        per_layer: Log every layer, not the whole network alone.
    """

    def __init__(self, batches: int = 10, per_layer: bool = True) -> None:
        super().__init__()
        check_number("batches", batches, 1)
        self.batches = batches
        self.per_layer = per_layer
        self._meter: SpikeMeter | None = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure, in training only, and not in the sanity check before it."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            network: Any = getattr(pl_module, "model", pl_module)
            self._meter = SpikeMeter(network, entropies=self.per_layer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop measuring after the first batches."""
        if self._meter is not None and batch_idx >= self.batches:
            self._meter.close()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics over all processes."""
        meter, self._meter = self._meter, None
        if meter is None:
            return

        def add(sums: Tensor) -> Tensor:
            total = trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum")
            assert isinstance(total, Tensor)
            return total

        pl_module.log_dict(meter.metrics(None if self.per_layer else (), add))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks from the network."""
        if self._meter is not None:
            self._meter.close()
