"""A short training on two processes that ends with a conversion, or with one that fails.

python convert_in_two.py [fail]

Every process writes what it sees when the training returns into a file of its own; the exit code is that of ``qsd``.
"""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import qsd.report.classifier
from qsd import QsdError
from qsd.callbacks import ConvertToSpikeDriven
from qsd.data import DigitsData
from qsd.tasks import ClassificationTask


def fail(*_):
    raise OSError("no room")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "fail" in sys.argv:
        qsd.report.classifier.save_packed = fail
    sizes = {"embed_dims": (8, 8, 8, 8), "num_heads": 2, "depth": 2, "strides": (1, 2, 2, 2, 1)}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        limit_train_batches=1,
        callbacks=[ModelCheckpoint(".", "best", monitor="val/loss"), ConvertToSpikeDriven(step_images=2, stages=[])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    code, seen = 0, ""
    try:
        trainer.fit(ClassificationTask("qsd_tiny", model_args=sizes), DigitsData(img_size=16, batch_size=50))
        seen = "report there" if Path("report.html").is_file() else "no report"
    except QsdError as error:
        code, seen = 2, str(error)
    Path(f"rank{trainer.global_rank}").write_text(seen)
    sys.exit(code)
