"""Firing rates and the information in attention's spikes, while a network trains."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from qsd.information import InformationMeter
from qsd.neurons import SpikeNeuron


class SpikeStatistics(Callback):
    """Log how much the network fires and how much attention's spikes tell, on the first batches of each validation.

    Logged: ``spikes/rate``, spikes per neuron and time step over the whole network; ``spikes/rate/<neuron>`` by layer;
    ``spikes/entropy/<attention>.q_neuron`` (and ``k``, ``v``), the counts' entropy in bits, at most ``log2(T + 1)``.
    `qsd.information` tells more about a checkpoint. A compiled network runs uncompiled where it is measured.

    Args:
        batches: how many batches of the validation data to measure, per process.
        per_layer: log every layer, not the whole network alone.
    """

    def __init__(self, batches: int = 10, per_layer: bool = True) -> None:
        super().__init__()
        self.batches = batches
        self.per_layer = per_layer
        self._fired: dict[str, Tensor] = {}
        self._meter: InformationMeter | None = None
        self._measuring = ExitStack()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put hooks on the neurons, in training only, and not for the sanity check before it."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        network: Any = getattr(pl_module, "model", pl_module)
        neurons = {name: m for name, m in network.named_modules() if isinstance(m, SpikeNeuron)}
        self._fired = {name: torch.zeros(2, dtype=torch.float64) for name in neurons}  # spikes, chances to fire
        self._meter = InformationMeter(network)
        self._measuring.enter_context(torch.compiler.set_stance("force_eager"))
        self._measuring.callback(self._meter.remove)
        for name, neuron in neurons.items():
            self._measuring.callback(neuron.register_forward_hook(self._hook(name)).remove)

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(neuron: SpikeNeuron, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            with torch.no_grad():
                counts = neuron.counts(*inputs)
                spikes = counts.sum(dtype=torch.float64)
                fired = torch.stack([spikes, torch.full_like(spikes, counts.numel() * neuron.time_steps)])
                self._fired[name] = self._fired[name].to(fired.device) + fired

        return hook

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop measuring after the first batches."""
        if batch_idx >= self.batches:
            self._measuring.close()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was measured, over all processes."""
        self._measuring.close()
        meter, self._meter = self._meter, None
        if meter is None or not self._fired:
            return

        def add_over_processes(sums: Tensor) -> Tensor:
            total = trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum")
            assert isinstance(total, Tensor)
            return total

        fired = {name: add_over_processes(sums) for name, sums in self._fired.items()}
        for signal_meter in meter.meters.values():
            signal_meter.reduce(add_over_processes)
        spikes, chances = torch.stack(list(fired.values())).sum(0).tolist()
        found = {"spikes/rate": spikes / chances}
        if self.per_layer:
            found |= {f"spikes/rate/{name}": (s / c).item() for name, (s, c) in fired.items()}
            for signal in meter.signals():
                if signal.entropy is not None:
                    found[f"spikes/entropy/{signal.layer}.{signal.projection[0]}_neuron"] = signal.entropy
        pl_module.log_dict(found)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off."""
        self._measuring.close()
