"""What a resumed training with mmengine's Runner keeps beside its weights, and settings that must agree."""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner

from qsd.errors import QsdError
from qsd.mm.loading import unwrapped
from qsd.mm.loops import ResumableEpochLoop

_LOADER, _GRADIENTS = "loader", "accumulated_gradients"  # of checkpoints; the first one in their meta


@HOOKS.register_module()
class ResumingHook(Hook):
    """Restore what mmengine leaves out, and refuse what would change the training without a word.

    ``tools/mmdet_train.py`` and ``tools/mmseg_train.py`` add this hook to every training.
    """

    def __init__(self) -> None:
        self._gradients: dict[str, torch.Tensor] = {}
        self._sent: dict[str, torch.Tensor] | None = None

    def send_gradients(self, runner: Runner) -> None:
        """Average the gradients since the last optimizer step over all processes, for the checkpoint that comes next.

        All processes call this function; mmengine calls ``before_save_checkpoint`` in the first one alone.

        Args:
            runner: The Runner of a training.
        """
        if runner.world_size > 1 and not runner.optim_wrapper.should_update():
            means = _averaged(dict(unwrapped(runner.model).named_parameters()))
            self._sent = means if dist.is_main_process() else None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add what decides the order of the images, and the gradients since the last optimizer step."""
        sent, self._sent = self._sent, None
        if checkpoint.get("optimizer") is None:
            return
        checkpoint["meta"][_LOADER] = _order(runner)
        wrapper: Any = runner.optim_wrapper
        if wrapper.should_update():
            return
        if runner.world_size == 1:
            named = unwrapped(runner.model).named_parameters()
            sent = {name: p.grad for name, p in named if p.grad is not None}
        if sent is None:
            runner.logger.warning("A checkpoint between two optimizer steps has no gradients of the batches so far.")
        checkpoint[_GRADIENTS] = {name: gradient.cpu() for name, gradient in (sent or {}).items()}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Check the settings of a training that goes on, and take over its seed and its place in the epoch."""
        if not runner._resume:
            return
        averaging = any(isinstance(hook, EMAHook) for hook in runner.hooks)
        if "ema_state_dict" in checkpoint and not averaging:
            raise QsdError(
                "the checkpoint is of a training with averaged weights, and this one has no averaging; add the EMAHook "
                "to custom_hooks, or start a new training from the averages with load_from."
            )
        meta, loop = checkpoint["meta"], runner.train_loop
        done = meta.get("epoch_batches", 0)
        if done or not isinstance(loop, EpochBasedTrainLoop):
            for name, value in _order(runner).items():
                before = meta.get(_LOADER, {}).get(name, value)
                if before != value:
                    raise QsdError(
                        f"the checkpoint is from within an epoch, which cannot go on with {name}={value} instead of "
                        f"{before}: images would be repeated or left out; keep this setting."
                    )
        if isinstance(loop, ResumableEpochLoop):
            loop.batches_done = done
        sampler: Any = getattr(loop.dataloader, "sampler", None)
        if meta.get("seed") is not None and hasattr(sampler, "seed"):
            sampler.seed = meta["seed"]  # It was built before the checkpoint was read.
        self._gradients = checkpoint.get(_GRADIENTS, {})

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Restore the gradients, on which the first batch adds up."""
        gradients, self._gradients = self._gradients, {}
        model = unwrapped(runner.model)
        for name, gradient in gradients.items():
            parameter = model.get_parameter(name)
            parameter.grad = gradient.to(parameter.device, parameter.dtype, copy=True)


def _order(runner: Runner) -> dict[str, int]:
    """What decides which images are in a batch."""
    loader: Any = runner.train_loop.dataloader
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
    return {"batch_size": int(size), "processes": runner.world_size, "images": len(loader.dataset)}


def _averaged(named: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Means of the gradients over all processes, some of which may not have reached a parameter."""
    reached = torch.tensor([float(p.grad is not None) for p in named.values()], device=dist.get_comm_device())
    dist.all_reduce(reached)
    means = {}
    for (name, parameter), processes in zip(named.items(), reached.tolist()):
        if processes:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            dist.all_reduce(gradient, "mean")
            means[name] = gradient.detach()
    return means


def send_gradients(runner: Runner) -> None:
    """Let the next checkpoint hold the gradients of accumulated batches; all processes call this function.

    Args:
        runner: A Runner; without a `ResumingHook` nothing happens.
    """
    for hook in runner.hooks:
        if isinstance(hook, ResumingHook):
            hook.send_gradients(runner)
