"""One training step in float64 with frozen batch norms, on PROCESSES processes: gradients, averaged, into a file.

A float twin teaches attention and logits; the file TEACHER holds its weights.

python one_step.py PROCESSES OUT TEACHER
"""

import sys

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from qsd.callbacks import Distillation
from qsd.data import DigitsData
from qsd.tasks import ClassificationTask


class FreezeAndRecord(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for norm in pl_module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.is_global_zero:
            torch.save({n: p.grad for n, p in pl_module.model.named_parameters()}, sys.argv[2])


if __name__ == "__main__":
    processes = int(sys.argv[1])
    torch.set_num_threads(1)
    L.seed_everything(0)
    sizes = {"embed_dims": (8, 8, 8, 8), "num_heads": 2, "depth": 4, "layer_scale": 0.5}
    task = ClassificationTask("qsd_tiny", model_args=sizes, optimizer="sgd", warmup_epochs=0)
    twin = {**sizes, "in_chans": 1}
    distillation = Distillation("qsd_tiny_ann", sys.argv[3], twin, attention_weight=1.0, logits_weight=1.0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        precision="64-true",
        max_steps=1,
        limit_val_batches=0,
        callbacks=[FreezeAndRecord(), distillation],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DigitsData(img_size=32, batch_size=16 // processes))
