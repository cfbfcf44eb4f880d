"""A checkpoint when a scheduler or the user stops a training with mmengine's Runner."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner

from qsd.errors import QsdError
from qsd.files import replace_content
from qsd.mm.hooks.resuming import send_gradients
from qsd.mm.resuming import POINTER
from qsd.stopping import StopRequest, outlast_stop_signals

INTERRUPTED = "interrupted.pth"


@HOOKS.register_module()
class SaveOnStopHook(Hook):
    """On SIGTERM or Ctrl-C, finish the batch, save ``interrupted.pth`` and stop the training.

    The counterpart of `qsd.runs.SaveOnStop`. ``--resume`` goes on from this file with the batch that would have come
    next. A validation is cut short, and left out of the resumed training; several processes finish it first.
    ``tools/mmdet_train.py`` and ``tools/mmseg_train.py`` add this hook to every training.

    Attributes:
        stepped: Whether this process has done a training step.
    """

    priority = "LOWEST"

    def __init__(self) -> None:
        self._request = StopRequest()
        self._training = False
        self.stepped = False

    def begin(self) -> None:
        """Remember signals from now on."""
        self._request.listen()
        self._training = True

    def before_train(self, runner: Runner) -> None:
        """Let data-loading processes leave the signals to this one."""
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None:
                loader: Any = loop.dataloader
                loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)

    def after_train_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        """Stop if that was asked for, in all processes after the same batch."""
        self.stepped = True
        asked = torch.tensor(float(self._request.received is not None))
        if dist.get_world_size() > 1:
            asked = asked.to(dist.get_comm_device())
            dist.all_reduce(asked)
        if asked:
            by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
            self._stop(runner, runner.iter + 1, batch_idx + 1 if by_epoch else 0)

    def after_val_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Stop a validation of one process; several ones may have different numbers of batches."""
        if self._request.received is None or not self._training or dist.get_world_size() > 1:
            return
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                hook.after_val_epoch(runner)  # It gives the model its raw weights again.
        self._stop(runner, runner.iter, 0)

    def finish(self) -> None:
        """Stop after the last batch, or handle signals as before: what comes now can be interrupted at any point."""
        self.end()
        if self._request.received is not None:
            self._say(f"{self._request.name} came after the last batch; all checkpoints are complete.")
            raise self._request.error()

    def end(self) -> None:
        """Handle signals as before the training."""
        self._training = False
        self._request.forget()

    def _stop(self, runner: Runner, iteration: int, epoch_batches: int) -> None:
        meta = {"epoch": runner.epoch, "iter": iteration, "epoch_batches": epoch_batches}
        path = Path(runner.work_dir, INTERRUPTED)
        message = f"stopped by {self._request.name}; go on with --resume {path}"
        try:
            send_gradients(runner)
            runner.save_checkpoint(runner.work_dir, INTERRUPTED, meta=meta, by_epoch=False)
            if dist.is_main_process():
                replace_content(Path(runner.work_dir, POINTER), str(path).encode())
        except QsdError as error:  # The exit code tells of the signal also where the disk is full.
            message = f"stopped by {self._request.name}, but no checkpoint could be saved: {error}"
        self._say(message)
        dist.barrier()
        raise self._request.error()

    def _say(self, message: str) -> None:
        if dist.is_main_process():
            print(message, file=sys.stderr)


class EndOfTraining(Hook):
    """Ends the watch of a `SaveOnStopHook` before any other hook works after the training.

    Args:
        watch: The hook.
    """

    priority = "HIGHEST"

    def __init__(self, watch: SaveOnStopHook) -> None:
        self._watch = watch

    def after_train(self, runner: Runner) -> None:
        """Stop after the last batch if that was asked for."""
        self._watch.finish()


def _start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    outlast_stop_signals()
    if start is not None:
        start(worker)
