"""An interrupted and resumed fit is the uninterrupted one, bit by bit, wherever it was interrupted."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from qsd.data import DigitsData, ImageArray
from tests.helpers import sample

BATCHES, EPOCHS = 3, 3


class FewDigits(DigitsData):
    """14 images of 8x8 pixels: three batches of 4 and a rest."""

    def __init__(self):
        super().__init__(img_size=8, batch_size=4, seed=3)

    def load_part(self, part):
        source = super().load_part(part)
        images = np.stack([np.asarray(source.load(index)) for index in range(14)])
        return ImageArray(images, source.labels[:14], [str(index) for index in range(14)])


class Linear(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 10)
        self.seen = []
        self.started = []

    def on_train_epoch_start(self):
        self.started.append(self.current_epoch)

    def training_step(self, batch):
        images, labels = batch
        self.seen.append((images.double().sum().item(), labels.tolist()))
        self.log("seen", images.mean())
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch):
        self.log("val", batch[0].mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def fit(folder=None, resume=None, **kwargs):
    callbacks = []
    if folder:
        callbacks = [
            ModelCheckpoint(folder, "step={step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False),
            ModelCheckpoint(
                folder,
                "end={epoch}",
                monitor="seen",
                save_top_k=-1,
                save_on_train_epoch_end=True,
                auto_insert_metric_name=False,
            ),
            ModelCheckpoint(
                folder,
                "val={epoch}",
                monitor="val",
                save_top_k=-1,
                save_on_train_epoch_end=False,
                auto_insert_metric_name=False,
            ),
        ]
        if kwargs.get("limit_val_batches") == 0:
            callbacks.pop()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        enable_checkpointing=bool(folder),
        num_sanity_val_steps=1,
        **kwargs,
    )
    module = Linear()
    trainer.fit(module, FewDigits(), ckpt_path=resume)
    return module


def names(kwargs, epochs=EPOCHS, first_step=1):
    steps = [f"step={step}" for step in range(first_step, BATCHES * epochs)]
    ends = [f"end={epoch}" for epoch in range(epochs - 1)]
    return (
        steps + ends + ([] if kwargs.get("limit_val_batches") == 0 else [f"val={epoch}" for epoch in range(epochs - 1)])
    )


def steps_done(name):
    kind, number = name.split("=")
    return int(number) if kind == "step" else BATCHES * (int(number) + 1)


def assert_continues(resumed, whole, done):
    assert resumed.seen == whole.seen[done:]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    # epochs in progress are not begun again, all others are begun, once
    assert resumed.started == [epoch for epoch in whole.started if BATCHES * epoch >= done]


# Lightning takes different paths with a limit of epochs or of steps, and with and without validation
SCHEDULES = [
    {"max_epochs": EPOCHS},
    {"max_steps": EPOCHS * BATCHES},
    {"max_epochs": EPOCHS, "limit_val_batches": 0},
    {"max_steps": EPOCHS * BATCHES, "limit_val_batches": 0},
]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("schedule", sample(SCHEDULES[::3], SCHEDULES), ids=str)
def test_resumed_from_every_checkpoint(tmp_path, schedule):
    whole = fit(tmp_path, **schedule)
    assert len(whole.seen) == EPOCHS * BATCHES
    assert len({total for total, _ in whole.seen}) == EPOCHS * BATCHES
    for name in names(schedule):
        assert_continues(fit(resume=tmp_path / f"{name}.ckpt", **schedule), whole, steps_done(name))


@pytest.mark.parametrize("schedule", sample(SCHEDULES[:1], SCHEDULES), ids=str)
@pytest.mark.parametrize("first", [f"step={BATCHES}", "end=0", f"step={BATCHES + 1}"])
def test_resumed_twice(tmp_path, schedule, first):
    whole = fit(tmp_path / "whole", **schedule)
    fit(tmp_path / "second", resume=tmp_path / "whole" / f"{first}.ckpt", **schedule)
    for name in ("step=5", "step=6", "end=1", "step=7"):
        assert_continues(fit(resume=tmp_path / "second" / f"{name}.ckpt", **schedule), whole, steps_done(name))


def test_part_of_an_epoch_per_epoch(tmp_path):
    schedule = {"max_epochs": 3, "limit_train_batches": 2}
    whole = fit(tmp_path, **schedule)
    for step in range(1, 6):
        resumed = fit(resume=tmp_path / f"step={step}.ckpt", **schedule)
        assert resumed.seen == whole.seen[step:]
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_a_fit_interrupted_after_its_last_step_still_ends(tmp_path):
    class Ended(Linear):
        ended = False

        def on_train_end(self):
            Ended.ended = True

    fit(tmp_path, max_epochs=EPOCHS)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=EPOCHS,
    )
    trainer.fit(Ended(), FewDigits(), ckpt_path=tmp_path / f"step={EPOCHS * BATCHES}.ckpt")
    assert Ended.ended


def test_overfit_batches_survives():
    module = fit(max_epochs=2, overfit_batches=2)
    assert len(module.seen) == 4
    assert module.seen[:2] == module.seen[2:]
