"""Hooks for mmengine's Runner: the counterparts of the Lightning callbacks, one class a module."""

from mmengine.runner import Runner

from qsd.mm.hooks.checkpoint import CheckpointHook
from qsd.mm.hooks.conversion import ConvertToSpikeDrivenHook
from qsd.mm.hooks.distillation import DistillationHook
from qsd.mm.hooks.interruption import EndOfTraining, SaveOnStopHook
from qsd.mm.hooks.neuron_initialization import NeuronInitializationHook
from qsd.mm.hooks.optimizer_state import OptimizerStateHook
from qsd.mm.hooks.resuming import ResumingHook
from qsd.mm.hooks.spike_statistics import SpikeStatisticsHook
from qsd.mm.hooks.step_size import StepSizeHook

__all__ = [
    "CheckpointHook",
    "ConvertToSpikeDrivenHook",
    "DistillationHook",
    "NeuronInitializationHook",
    "OptimizerStateHook",
    "ResumingHook",
    "SaveOnStopHook",
    "SpikeStatisticsHook",
    "StepSizeHook",
    "register_training_hooks",
    "stop_hook",
]


def register_training_hooks(runner: Runner) -> None:
    """Add the hooks that every training needs, unless its configuration lists them.

    Args:
        runner: A Runner that has not started.
    """
    for kind in (OptimizerStateHook, NeuronInitializationHook, ResumingHook, SaveOnStopHook):
        if not any(isinstance(hook, kind) for hook in runner.hooks):
            runner.register_hook(kind())
    runner.register_hook(EndOfTraining(stop_hook(runner)))


def stop_hook(runner: Runner) -> SaveOnStopHook:
    """The hook that answers SIGTERM and Ctrl-C during the training.

    Args:
        runner: A Runner after `register_training_hooks`.
    """
    return next(hook for hook in runner.hooks if isinstance(hook, SaveOnStopHook))
