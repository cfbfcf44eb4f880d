"""Trainings with one or two processes that write what each process saw."""

import json

import lightning as L
import torch


class Record(L.LightningModule):
    """Writes what every process saw; the batch norm has buffers that DDP sends around."""

    def __init__(self, folder, features=64):
        super().__init__()
        torch.manual_seed(0)
        self.folder = folder
        layers = (torch.nn.Flatten(), torch.nn.BatchNorm1d(features), torch.nn.Linear(features, 10))
        self.net = torch.nn.Sequential(*layers)
        self.seen = {"train": [], "val": [], "predict": []}

    def training_step(self, batch):
        images, labels = batch
        self.seen["train"].append(images.flatten(1).double().sum(1).tolist())
        return torch.nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch):
        images, _ = batch
        self.net(images)
        self.seen["val"] += images.flatten(1).double().sum(1).tolist()
        self.log("mean", images.mean(), sync_dist=True)

    def predict_step(self, batch):
        self.net(batch[0])
        self.seen["predict"] += batch[1]

    def on_fit_end(self):
        self.write("fit")

    def on_predict_end(self):
        self.write("predict")

    def write(self, name):
        (self.folder / f"{name}{self.global_rank}.json").write_text(json.dumps(self.seen))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run_processes(folder, processes, batch_size, data, features=64):
    folder.mkdir()
    parallel = {"strategy": "ddp_fork", "devices": processes} if processes > 1 else {"devices": 1}
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **parallel,
    )
    module = Record(folder, features)
    trainer.fit(module, data(batch_size))
    trainer.predict(module, data(batch_size), return_predictions=False)
    return [
        {
            **json.loads((folder / f"fit{rank}.json").read_text()),
            "predict": json.loads((folder / f"predict{rank}.json").read_text())["predict"],
        }
        for rank in range(processes)
    ]
