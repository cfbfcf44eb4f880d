"""Two real processes under Lightning: nothing repeated or left out in evaluation, and the same training."""

import json

import lightning as L
import pytest
import torch

from qsd.data import DigitsData
from qsd.errors import QsdError

pytestmark = pytest.mark.filterwarnings("ignore")


class Record(L.LightningModule):
    """Writes what every process saw; the batch norm has buffers that DDP sends around."""

    def __init__(self, folder):
        super().__init__()
        torch.manual_seed(0)
        self.folder = folder
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 10))
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


class FewDigits(DigitsData):
    """The first 21 images of each part: ten per process and one more for the first."""

    count = 21

    def __init__(self, batch_size):
        super().__init__(img_size=8, batch_size=batch_size)

    def load_part(self, part):
        source = super().load_part(part)
        return type(source)(source._images[: self.count], source.labels[: self.count], source._names[: self.count])


def run(folder, processes, batch_size, data=FewDigits):
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
    module = Record(folder)
    trainer.fit(module, data(batch_size))
    trainer.predict(module, data(batch_size), return_predictions=False)
    return [
        {
            **json.loads((folder / f"fit{rank}.json").read_text()),
            "predict": json.loads((folder / f"predict{rank}.json").read_text())["predict"],
        }
        for rank in range(processes)
    ]


@pytest.mark.timeout(120)
def test_two_processes_see_what_one_sees(tmp_path):
    (one,) = run(tmp_path / "one", 1, 10)
    two = run(tmp_path / "two", 2, 5)
    # evaluation: every image once, though 21 do not divide by 2 and one process has a batch more
    for stage, repeats in (("val", 2), ("predict", 1)):
        assert len(one[stage]) == 21 * repeats
        assert sorted(one[stage]) == sorted(two[0][stage] + two[1][stage])
        assert [len(seen[stage]) for seen in two] == [11 * repeats, 10 * repeats]
    # training: the same images, augmented the same way, in the same step
    assert [len(seen["train"]) for seen in two] == [len(one["train"])] * 2 == [4, 4]
    for step in range(4):
        assert sorted(one["train"][step]) == sorted(two[0]["train"][step] + two[1]["train"][step])


@pytest.mark.timeout(120)
def test_fewer_images_than_processes_is_an_error_not_a_hang(tmp_path):
    class OneDigit(FewDigits):
        count = 1

    with pytest.raises(Exception, match=r"1 image\(s\) cannot be evaluated by 2 processes") as error:
        run(tmp_path / "two", 2, 5, OneDigit)
    assert QsdError.__name__ in str(error.value) or isinstance(error.value, QsdError)
