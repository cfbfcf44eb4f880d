"""Firing rates and the information in attention's spikes, while a network trains."""

from collections.abc import Callable
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
    `qsd.information` tells more about a checkpoint.

    Args:
        batches: how many batches of the validation data to measure, per process.
        per_layer: log every layer, not the whole network alone.
    """

    def __init__(self, batches: int = 10, per_layer: bool = True) -> None:
        super().__init__()
        self.batches = batches
        self.per_layer = per_layer
        self._meter: InformationMeter | None = None
        self._active = False
        self._fired: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the hooks on before anything is compiled; they sleep until validation."""
        student: Any = getattr(pl_module, "model", pl_module)
        self._meter = InformationMeter(student)
        neurons = {name: m for name, m in student.named_modules() if isinstance(m, SpikeNeuron)}
        self._fired = {name: torch.zeros(2, dtype=torch.float64) for name in neurons}  # spikes, chances to fire
        self._handles = [neuron.register_forward_hook(self._hook(name)) for name, neuron in neurons.items()]

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(neuron: SpikeNeuron, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            if self._active:
                with torch.no_grad():
                    counts = neuron.counts(*inputs)
                    spikes = counts.sum(dtype=torch.float64)
                    fired = torch.stack([spikes, torch.full_like(spikes, counts.numel() * neuron.time_steps)])
                    self._fired[name] = self._fired[name].to(fired.device) + fired

        return hook

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure the first batches."""
        self._measure(not trainer.sanity_checking and dataloader_idx == 0 and batch_idx < self.batches)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Go back to sleep."""
        self._measure(False)

    def _measure(self, active: bool) -> None:
        if self._meter is not None:
            self._active = self._meter.active = active

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was measured, over all processes, and start afresh."""
        if self._meter is None or trainer.sanity_checking:
            return

        def add_over_processes(sums: Tensor) -> Tensor:
            total = trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum")
            assert isinstance(total, Tensor)
            return total

        fired = {name: add_over_processes(sums) for name, sums in self._fired.items()}
        for meter in self._meter.meters.values():
            meter.reduce(add_over_processes)
        found: dict[str, float] = {}
        if fired:
            spikes, chances = torch.stack(list(fired.values())).sum(0).tolist()
            found["spikes/rate"] = spikes / max(chances, 1)
        if self.per_layer:
            found |= {f"spikes/rate/{name}": (s / c.clamp(min=1)).item() for name, (s, c) in fired.items()}
            for signal in self._meter.signals():
                if signal.entropy is not None:
                    found[f"spikes/entropy/{signal.layer}.{signal.projection[0]}_neuron"] = signal.entropy
        pl_module.log_dict(found)
        self._fired = {name: torch.zeros(2, dtype=torch.float64) for name in self._fired}
        for meter in self._meter.meters.values():
            meter.reset()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._meter is not None:
            self._meter.remove()
        self._meter, self._handles, self._fired = None, [], {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """See `on_fit_end`."""
        self._release()
