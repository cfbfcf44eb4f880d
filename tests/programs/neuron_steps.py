"""Begin a training of CSDformer on two processes; each writes its neurons' steps into OUT.<rank>.pt.

python neuron_steps.py OUT
"""

import sys

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from qsd.data import DigitsData
from qsd.tasks import ClassificationTask


class Record(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        steps = {n: p.detach() for n, p in pl_module.model.named_parameters() if n.endswith("neuron.step")}
        torch.save(steps, f"{sys.argv[1]}.{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    L.seed_everything(0)
    sizes = {"embed_dims": 8, "num_heads": 2, "depth": 1}
    task = ClassificationTask("csdformer_4_256", model_args=sizes, base_lr=0.0, min_lr=0.0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=1,
        limit_val_batches=0,
        callbacks=[Record()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DigitsData(img_size=16, batch_size=4))
