"""Firing rates and entropies, logged while a network trains."""

import csv
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from qsd import count_spikes
from qsd.callbacks import SpikeStatistics
from qsd.information import measure_information
from tests.helpers.training import FewDigits, make_task, make_trainer


def fit(folder, task, *callbacks, **options):
    logger = CSVLogger(folder)
    trainer = make_trainer(folder, callbacks, logger=logger, **{"max_epochs": 1, **options})
    trainer.fit(task, FewDigits(batch_size=4))
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("spikes/rate")]


def test_what_is_logged_is_the_validated_network_s(tmp_path):
    # The averaged weights are validated, and measured; the last checkpoint holds them.
    task = make_task(model_args={"depth": 2})
    average = EMAWeightAveraging(decay=0.5, use_buffers=True)
    checkpoint = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    (row,) = fit(tmp_path, task, average, checkpoint, SpikeStatistics())
    network = timm.create_model("qsd_tiny", num_classes=10, **task.hparams["model_args"])
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    data = FewDigits(batch_size=8)
    (images, _), *rest = data.val_dataloader()
    assert rest == []
    with torch.no_grad():
        counts = count_spikes(network.eval(), images)
    for name, tensor in counts.items():
        assert float(row[f"spikes/rate/{name}"]) == pytest.approx(tensor.mean().item() / 4, rel=1e-4), name
    spikes, chances = sum(t.sum().item() for t in counts.values()), sum(4 * t.numel() for t in counts.values())
    assert float(row["spikes/rate"]) == pytest.approx(spikes / chances, rel=1e-4)
    for signal in measure_information(network, [images]).signals:
        logged = row[f"spikes/entropy/{signal.layer}.{signal.projection[0]}_neuron"]
        assert float(logged) == pytest.approx(signal.entropy, rel=1e-4)


def test_only_the_first_batches_of_each_validation_are_measured_and_the_hooks_go(tmp_path):
    task, callback = make_task(base_lr=0.0, min_lr=0.0), SpikeStatistics(batches=1, per_layer=False)
    rows = fit(tmp_path, task, callback, max_epochs=2)
    assert [key for key in rows[0] if key.startswith("spikes")] == ["spikes/rate"]
    assert len(rows) == 2
    assert not any(m._forward_hooks for m in task.model.modules())


def test_a_float_twin_has_nothing_to_log(tmp_path):
    task = make_task()
    task.hparams["model"] = "qsd_tiny_ann"
    assert fit(tmp_path, task, SpikeStatistics()) == []
