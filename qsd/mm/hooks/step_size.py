"""Check of step sizes during training with mmengine's Runner."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from qsd.errors import QsdError
from qsd.layers.steps import collapsed_step


@HOOKS.register_module()
class StepSizeHook(Hook):
    """Stop the training when a step size is no longer positive, and name its layer.

    The last checkpoint that was written stays; ``--resume`` goes on from it.
    """

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Check all step sizes, of weights and of neurons."""
        if (found := collapsed_step(runner.model)) is not None:
            name, step = found
            raise QsdError(
                f"a step size of {name} is {step:.3g} at iteration {runner.iter + 1}, not positive; try a lower "
                "learning rate, a lower paramwise_cfg.step_lr, or gradient clipping."
            )
