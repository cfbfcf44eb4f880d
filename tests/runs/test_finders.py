"""Lightning's finders of learning rates and batch sizes, and first batches that tell nothing of the network."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner.lr_finder import _LRFinder

from qsd.neurons import LsqNeuron
from qsd.tasks import ClassificationTask
from qsd.tasks.neuron_initialization import set_neurons
from tests.helpers.training import FewDigits, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")
DEFAULT = LsqNeuron(4).step.item()


def csd_task(**options):
    sizes = {"embed_dims": 8, "num_heads": 2, "depth": 1}
    return ClassificationTask("csdformer_4_256", sizes, optimizer="adamw", base_lr=0.05, warmup_epochs=1, **options)


def steps(task):
    return [p.item() for n, p in task.model.named_parameters() if n.endswith("neuron.step")]


@pytest.mark.parametrize("name", ["", "base_lr"])
def test_a_found_rate_is_used_as_it_is_and_the_steps_come_from_data(tmp_path, monkeypatch, name):
    seen = []
    original = _LRFinder.suggestion

    def suggestion(self, *args, **kwargs):
        original(self, *args, **kwargs)
        seen.append(True)
        return 0.02

    monkeypatch.setattr(_LRFinder, "suggestion", suggestion)
    task = csd_task(step_lr=0.1)
    finder = LearningRateFinder(num_training_steps=3, early_stop_threshold=None, attr_name=name)
    trainer = make_trainer(tmp_path, [finder], max_epochs=1)
    trainer.fit(task, FewDigits())
    assert seen
    rates = {round(group["initial_lr"], 6) for group in trainer.optimizers[0].param_groups}
    assert rates == {0.02, 0.002}  # of weights, and of steps
    assert task.hparams["base_lr"] == pytest.approx(0.02 * 256 / 8)
    assert trainer.global_step == 2
    assert all(abs(step - DEFAULT) > 0.01 for step in steps(task)[:1])
    assert len(set(steps(task))) > 3


def test_the_rate_follows_a_found_batch_size(tmp_path):
    task, data = csd_task(), FewDigits()
    finder = BatchSizeFinder(steps_per_trial=1, init_val=4, max_trials=1)
    trainer = make_trainer(tmp_path, [finder], max_epochs=1)
    trainer.fit(task, data)
    assert data.batch_size == 4
    assert max(group["initial_lr"] for group in trainer.optimizers[0].param_groups) == pytest.approx(0.05 * 4 / 256)
    assert trainer.global_step == 5
    assert len(set(steps(task))) > 3


def test_images_of_one_colour_or_without_numbers_set_no_steps(tmp_path):
    task = csd_task(num_classes=10)
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision: decision)
    task.configure_model()
    fake = SimpleNamespace(trainer=SimpleNamespace(strategy=strategy, world_size=1), model=task.model)
    before = steps(task)
    black, noise = torch.zeros(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    broken = noise.clone()
    broken[0, 0, 0, 0] = float("nan")
    for images in (black, black - 1, broken, broken * torch.nan):
        assert not set_neurons(fake, images)
    assert steps(task) == before
    assert set_neurons(fake, torch.cat([black, noise]))
    assert min(steps(task)) > 1e-3
