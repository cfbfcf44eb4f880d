"""Hooks for mmengine's Runner: the twins of the Lightning callbacks."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from qsd.errors import QsdError
from qsd.mm.loading import unwrapped
from qsd.models.diagnosis import collapsed_step
from qsd.neurons import SpikeNeuron


@HOOKS.register_module()
class StepSizeHook(Hook):
    """Stop the training, and name the layer, when a step size is no longer positive.

    The last checkpoint that was written stays; ``--resume`` goes on from it.
    """

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Look at all step sizes, of weights and of neurons."""
        if (found := collapsed_step(runner.model)) is not None:
            name, step = found
            raise QsdError(
                f"a step size of {name} is {step:.3g} at iteration {runner.iter + 1}, not positive; try a lower "
                "learning rate, a lower paramwise_cfg.step_lr, or gradient clipping."
            )


@HOOKS.register_module()
class SpikeStatisticsHook(Hook):
    """Log firing rates during validation and testing: spikes per neuron and time step, from 0 to 1.

    For each neuron ``spikes/<name>``, and over all neurons ``spikes/mean`` (each neuron in proportion to its size).
    They appear with the metrics in the log and in every backend of the visualizer.

    Args:
        neurons: log these by name; ``None`` for the mean alone.
    """

    def __init__(self, neurons: Sequence[str] | None = None) -> None:
        self.names = tuple(neurons or ())
        self._handles: list[Any] = []
        self._spikes: dict[str, float] = {}
        self._chances: dict[str, float] = {}

    def before_run(self, runner: Runner) -> None:
        """Refuse names that the model does not have."""
        known = _neurons(runner)
        wrong = [name for name in self.names if name not in known]
        if wrong:
            raise QsdError(f"SpikeStatisticsHook: no neuron {wrong[0]!r}; there are {', '.join(list(known)[:3])}, ...")

    def _start(self, runner: Runner) -> None:
        self._spikes, self._chances = {}, {}
        self._handles = [
            neuron.register_forward_hook(self._counting(name)) for name, neuron in _neurons(runner).items()
        ]

    def _counting(self, name: str) -> Any:
        def hook(module: SpikeNeuron, _inputs: tuple[Tensor], output: Tensor) -> None:
            spikes = output.detach().sum(dtype=torch.float64).item() / module.amplitude
            self._spikes[name] = self._spikes.get(name, 0.0) + spikes
            self._chances[name] = self._chances.get(name, 0.0) + output.numel() * module.time_steps

        return hook

    def _finish(self, runner: Runner, mode: str, metrics: dict[str, float] | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        rates = {name: self._spikes[name] / chances for name, chances in self._chances.items() if chances}
        logged = {f"spikes/{name}": rates[name] for name in self.names if name in rates}
        if rates:
            logged["spikes/mean"] = sum(self._spikes.values()) / sum(self._chances.values())
        for name, rate in logged.items():
            runner.message_hub.update_scalar(f"{mode}/{name}", rate)
        if metrics is not None:
            metrics.update(logged)

    def before_val_epoch(self, runner: Runner) -> None:
        """Begin to count."""
        self._start(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Put the rates among the metrics."""
        self._finish(runner, "val", metrics)

    def before_test_epoch(self, runner: Runner) -> None:
        """Begin to count."""
        self._start(runner)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Put the rates among the metrics."""
        self._finish(runner, "test", metrics)


def _neurons(runner: Runner) -> dict[str, SpikeNeuron]:
    modules = unwrapped(runner.model).named_modules()
    return {name: module for name, module in modules if isinstance(module, SpikeNeuron)}
