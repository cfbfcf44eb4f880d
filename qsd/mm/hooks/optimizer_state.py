"""Optimizer states that mmengine's Runner restores by the names of parameters."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from qsd.mm.loading import unwrapped
from qsd.training.optimizer_state import add_names, restore_by_name


@HOOKS.register_module()
class OptimizerStateHook(Hook):
    """Store the names of parameters with the optimizer state, and resume by them.

    ``tools/mmdet_train.py`` and ``tools/mmseg_train.py`` add this hook to every training. It also resumes files of
    version 0.1.0, which have no names (see `qsd.training.optimizer_state`).
    """

    def before_run(self, runner: Runner) -> None:
        """Name the parameters of the optimizer, if this run trains."""
        optimizer = _optimizer(runner)
        if optimizer is not None and not all("param_names" in group for group in optimizer.param_groups):
            restore_by_name(optimizer, unwrapped(runner.model))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the names to a file of version 0.1.0, if its training goes on."""
        optimizer = _optimizer(runner)
        if runner._resume and optimizer is not None and "optimizer" in checkpoint:
            add_names(checkpoint["optimizer"], checkpoint["state_dict"], optimizer, unwrapped(runner.model))


def _optimizer(runner: Runner) -> Any:
    """The optimizer of a training. A runner that only tests holds its configuration instead."""
    wrapper = runner.optim_wrapper
    return getattr(wrapper, "optimizer", None) if isinstance(wrapper, OptimWrapper) else None
