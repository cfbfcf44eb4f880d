"""Parameter groups and learning-rate schedule of a classifier's training."""

import math
from collections.abc import Callable, Set
from typing import Any

import torch
from lightning.pytorch import Trainer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from qsd.errors import QsdError
from qsd.training.parameter_groups import step_parameters


def parameter_groups(
    model: nn.Module, lr: float, step_lr: float, weight_decay: float, layer_decay: float | None
) -> list[dict[str, Any]]:
    """Parameters by weight decay, by layer if their learning rates differ, and by whether they are step sizes.

    Args:
        model: A network of timm's kind.
        lr: Learning rate of the last layer.
        step_lr: Learning rate of step sizes over that of the other parameters of their layer.
        weight_decay: Weight decay of parameters with more than one dimension.
        layer_decay: Factor of the learning rate from one layer group to the one below; ``None`` for none.

    Returns:
        Groups with ``params``, ``weight_decay`` and ``lr``.
    """
    exempt: Set[str] = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    steps = step_parameters(model)
    split = []
    for group in groups:
        lr_group = lr * group.get("lr_scale", 1.0)
        for are_steps, factor in ((False, 1.0), (True, step_lr)):
            parameters = [p for p in group["params"] if (id(p) in steps) == are_steps]
            if parameters:
                decay = group["weight_decay"]
                split.append({"params": parameters, "weight_decay": decay, "lr": lr_group * factor})
    return split


class Schedule(LambdaLR):
    """A factor of all learning rates by optimizer step, whose resumed training keeps peak rates of its own.

    Args:
        optimizer: Its groups' initial rates are the peak rates.
        factor: Function of the number of the step.
        per_epoch: Optimizer steps of an epoch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float], per_epoch: int) -> None:
        self._factor, self.per_epoch, self.shift = factor, per_epoch, 0
        super().__init__(optimizer, lambda step: self._factor(step + self.shift))

    def state_dict(self) -> dict[str, Any]:
        """The state without the function, which the settings of a training give."""
        state = super().state_dict()
        del state["_factor"]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step, but neither peak rates nor the length of an epoch.

        Args:
            state_dict: State of a schedule, also of version 0.1.0.
        """
        per_epoch, before = self.per_epoch, state_dict.get("per_epoch", self.per_epoch)
        super().load_state_dict(state_dict)
        self.per_epoch = per_epoch
        # The optimizer is restored before its schedule, and its groups may stand in another order than at first.
        self.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        if before != per_epoch and before:
            # An epoch has another number of steps than before: the schedule goes on from the same share of the epochs.
            place = (self.last_epoch + self.shift) * per_epoch / before
            self.shift = round(place) - self.last_epoch


def warmup_and_cosine(
    trainer: Trainer, optimizer: torch.optim.Optimizer, lr: float, min_lr: float, warmup_epochs: float
) -> Schedule:
    """A linear warm-up and a cosine decay, both by optimizer steps.

    All groups have the same factor, so that groups with a lower rate keep their proportion to the end.

    Args:
        trainer: Trainer of a training of known length.
        optimizer: Its groups' initial rates are the peak rates.
        lr: Peak rate of parameters at the full rate.
        min_lr: Their final rate.
        warmup_epochs: Epochs of warm-up.

    Raises:
        QsdError: If the training has no end.
    """
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise QsdError("the length of the training is unknown; set --trainer.max_epochs or --trainer.max_steps.")
    # To count the batches, the training data is set up here. It must be set up again once a checkpoint's progress is
    # loaded, or Lightning (2.6) forgets to hand the loader its place in the epoch.
    trainer.fit_loop.setup_data()
    trainer.fit_loop._combined_loader = None
    steps = max(int(total), 1)
    batches = trainer.num_training_batches / trainer.accumulate_grad_batches
    warmup = min(int(warmup_epochs * batches), steps - 1) if batches < float("inf") else 0
    floor = min(min_lr / lr, 1.0) if lr > 0 else 0.0

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / (steps - warmup), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    by_epochs = trainer.max_steps == -1 and batches < float("inf")
    return Schedule(optimizer, factor, math.ceil(batches) if by_epochs else 0)
