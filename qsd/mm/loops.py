"""A training loop of mmengine that goes on within an epoch."""

from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop


@LOOPS.register_module(name="EpochBasedTrainLoop", force=True)
class ResumableEpochLoop(EpochBasedTrainLoop):
    """Epoch by epoch, as mmengine trains; a resumed epoch leaves out the batches that were trained before.

    Attributes:
        batches_done: Batches of the epoch that begins next which are left out. They are loaded all the same, because
            batch samplers cannot be asked for a place in their order.
    """

    batches_done = 0

    def run_epoch(self) -> None:
        """Train for an epoch, or for what is left of it."""
        done, self.batches_done = self.batches_done, 0
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        if done < len(self.dataloader):
            for index, batch in enumerate(self.dataloader):
                if index >= done:
                    self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1
