"""Firing rates during validation and testing with mmengine's Runner."""

import warnings
from collections.abc import Sequence
from typing import Any

from mmengine import dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from qsd.errors import QsdError
from qsd.mm.loading import unwrapped
from qsd.neurons import SpikeNeuron
from qsd.training.spike_meter import SpikeMeter


@HOOKS.register_module()
class SpikeStatisticsHook(Hook):
    """Log firing rates, and the entropy of attention's spike counts, in validation and testing.

    The counterpart of `qsd.callbacks.SpikeStatistics`: the same metrics, over all processes, among the metrics in the
    log and in every backend of the visualizer.

    Args:
        batches: Number of batches to measure, per process; ``None`` for all.
        per_layer: Log every layer, not the whole model alone.
        neurons: Deprecated: log these neurons by name, and no other layer.
    """

    def __init__(
        self, batches: int | None = None, per_layer: bool = False, neurons: Sequence[str] | None = None
    ) -> None:
        if neurons is not None:
            text = "SpikeStatisticsHook: neurons is deprecated; use per_layer=True, which logs every layer."
            warnings.warn(text, FutureWarning, stacklevel=2)
        self.batches = batches
        self.layers = tuple(neurons) if neurons is not None else None if per_layer else ()
        self._meter: SpikeMeter | None = None

    def before_run(self, runner: Runner) -> None:
        """Refuse names that the model does not have."""
        known = [name for name, m in unwrapped(runner.model).named_modules() if isinstance(m, SpikeNeuron)]
        wrong = [name for name in self.layers or () if name not in known]
        if wrong:
            raise QsdError(f"SpikeStatisticsHook: no neuron {wrong[0]!r}; there are {', '.join(known[:3])}, ...")

    def _before_epoch(self, runner: Runner, mode: str = "train") -> None:
        if mode != "train":
            self._meter = SpikeMeter(unwrapped(runner.model), entropies=self.layers is None)

    def _after_iter(self, runner: Runner, batch_idx: int, *_: Any, mode: str = "train", **__: Any) -> None:
        if self._meter is not None and mode != "train" and batch_idx + 1 == self.batches:
            self._meter.close()

    def _finish(self, runner: Runner, mode: str, metrics: dict[str, float] | None) -> None:
        meter, self._meter = self._meter, None
        if meter is None:
            return
        found = meter.metrics(self.layers, _add)
        for name, rate in found.items():
            runner.message_hub.update_scalar(f"{mode}/{name}", rate)
        if metrics is not None:
            metrics.update(found)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Add the rates to the metrics."""
        self._finish(runner, "val", metrics)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Add the rates to the metrics."""
        self._finish(runner, "test", metrics)


def _add(sums: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.get_world_size() > 1:
        sums = sums.to(dist.get_comm_device())
        dist.all_reduce(sums)
    return sums
