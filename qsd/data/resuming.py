"""Two corrections of how Lightning resumes a training from a checkpoint of the end of an epoch.

Found in Lightning 2.6, by reading `_FitLoop` and `_TrainingEpochLoop` and by comparing with uninterrupted runs:

- After a checkpoint that was written between the last training batch and validation, Lightning goes on with the next
  epoch without counting its start. A second interruption in that epoch then repeats it from its start.
- With ``max_steps`` a finished epoch counts as unfinished, so that one number of an epoch is left out, and without
  validation one batch too many is taken.

Neither happens if the loaded progress is that of a finished epoch.
"""

from typing import Any

from lightning.pytorch import Trainer


def finish_loaded_epoch(trainer: Trainer) -> None:
    """Let a resumed training begin the next epoch if the checkpoint has all training steps of the last one.

    Call it after the checkpoint's progress is loaded and before the fit loop runs. A training that
    resumes in the middle of an epoch, or does not resume, is not changed.

    Args:
        trainer: Trainer that is about to fit.
    """
    loop: Any = trainer.fit_loop  # Its trackers are typed too loosely.
    if not loop.restarting:
        return
    epochs, batches = loop.epoch_progress, loop.epoch_loop.batch_progress
    current = batches.current
    saved_after_last_batch = batches.is_last_batch and current.ready == current.processed == current.completed + 1
    # The very last epoch is left alone: there is no next one, and closing it here would leave out `on_train_end`.
    is_last_epoch = loop.max_epochs == epochs.current.processed + 1
    if saved_after_last_batch and epochs.current.started == epochs.current.processed + 1 and not is_last_epoch:
        batches.increment_completed()
        loop.epoch_loop._batches_that_stepped += 1
        epochs.increment_processed()
    if epochs.current.ready == epochs.current.started == epochs.current.processed:
        # Not `loop.restarting`: with `max_steps` that setter turns False into True.
        loop._restarting = False
        loop.epoch_loop.restarting = False
