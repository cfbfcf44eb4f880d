"""The task: schedules, auxiliary losses, resuming, and every way in which a training must stop."""

import copy
import csv
from pathlib import Path

import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from timm.data import Mixup

from qsd import QsdError, initialize_neurons
from qsd.neurons import LsqNeuron
from qsd.quantizers import StepSizeQuantizer
from qsd.tasks import ClassificationTask
from tests.helpers import sample
from tests.helpers.training import SMALL, FewDigits, InterruptAfter, Interrupted, make_task, make_trainer

# -- resuming ---------------------------------------------------------------------------------------------------------


def _fit(folder, interrupt_after=None, resume=None):
    """Everything random at once: order, augmentation, Mixup (numpy), stochastic depth (torch), averaged weights."""
    L.seed_everything(5)
    task = make_task(mixup=0.5, model_args={"drop_path_rate": 0.3})
    callbacks = [
        EMAWeightAveraging(decay=0.8, use_buffers=True),
        ModelCheckpoint(
            folder, "last", every_n_train_steps=1, save_on_train_epoch_end=False, enable_version_counter=False
        ),
    ]
    if interrupt_after is not None:
        callbacks.append(InterruptAfter(interrupt_after))
    make_trainer(folder, callbacks, max_epochs=3).fit(task, FewDigits(), ckpt_path=resume)
    return task


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The task after a training that was not interrupted."""
    torch.set_num_threads(1)  # as in every test
    return _fit(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("step", sample([2, 3], [1, 2, 3, 5]))  # two steps an epoch: within epochs and at their end
def test_an_interrupted_and_resumed_training_ends_with_the_same_bits(step, whole, tmp_path):
    with pytest.raises(Interrupted):
        _fit(tmp_path / "part", interrupt_after=step)
    torch.manual_seed(99)  # another process has other random states
    resumed = _fit(tmp_path / "part", resume=tmp_path / "part" / "last.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name


# -- what is optimised ------------------------------------------------------------------------------------------------


def test_the_learning_rate_follows_the_total_batch_warms_up_and_ends_at_its_minimum(tmp_path):
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append([g["lr"] for g in trainer.optimizers[0].param_groups])

    task = make_task(base_lr=0.32, warmup_epochs=2, min_lr=1e-5, step_lr=0.1)
    make_trainer(tmp_path, [Watch()], max_epochs=4, accumulate_grad_batches=2, limit_val_batches=0).fit(
        task, FewDigits(4)
    )
    peak = 0.32 * 4 * 2 / 256  # four images, two batches accumulated
    main = [max(r) for r in rates]
    assert max(main) == pytest.approx(peak)
    # five batches and so three optimiser steps an epoch (the last one of a single batch): warm-up of 2 x 2.5 steps
    assert list(dict.fromkeys(main))[:5] == pytest.approx([peak * (i + 1) / 5 for i in range(5)])
    assert all(b <= a + 1e-12 for a, b in zip(main[main.index(max(main)) :], main[main.index(max(main)) + 1 :]))
    assert main[-1] < peak * 0.1
    steps = [m for m in task.model.modules() if isinstance(m, StepSizeQuantizer)]
    optimizer = task.trainer.optimizers[0]
    slow = [g for g in optimizer.param_groups if any(p is steps[0].step for p in g["params"])]
    assert len(slow) == 1
    assert len(slow[0]["params"]) == len(steps)
    assert slow[0]["weight_decay"] == 0
    assert all(r[optimizer.param_groups.index(slow[0])] == pytest.approx(0.1 * m) for r, m in zip(rates[:1], main))
    decayed = [p for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]]
    assert all(p.dim() > 1 for p in decayed)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(task.model.parameters()))


def test_slow_groups_stay_slow_to_the_end(tmp_path):
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append([g["lr"] for g in trainer.optimizers[0].param_groups])

    task = make_task(layer_decay=0.5, min_lr=1e-4, warmup_epochs=0, step_lr=0.01)
    make_trainer(tmp_path, [Watch()], max_epochs=4).fit(task, FewDigits())
    first, last = rates[0], rates[-1]
    assert all(b < a for a, b in zip(first, last))
    assert [b / a for a, b in zip(first, last)] == pytest.approx([last[0] / first[0]] * len(first))


def test_layer_decay_slows_early_layers(tmp_path):
    task = make_task(layer_decay=0.5, model_args={})
    trainer = make_trainer(tmp_path, fast_dev_run=True)
    trainer.fit(task, FewDigits())
    rate = {id(p): g["initial_lr"] for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert rate[id(task.model.stem.downsample.proj.conv.weight)] < rate[id(task.model.head.weight)]


def test_auxiliary_losses_add_to_the_loss_are_logged_and_stay_out_of_copies_and_checkpoints(tmp_path):
    teacher = torch.nn.Linear(3, 3)

    class Owner(Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.add_auxiliary_loss(self.loss)

        def loss(self, images, logits):
            assert logits.shape == (len(images), 10)
            return {"teacher": 7 + 0 * teacher.weight.sum() + 0 * logits.sum()}

    task = make_task()
    average = EMAWeightAveraging(decay=0.5)
    logger = CSVLogger(tmp_path)
    checkpoint = ModelCheckpoint(tmp_path, "x", save_last=True)
    make_trainer(tmp_path, [Owner(), average, checkpoint], logger=logger, log_every_n_steps=1).fit(task, FewDigits())
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert all(float(r["train/loss"]) == pytest.approx(float(r["train/loss_task"]) + 7, abs=1e-4) for r in rows)
    assert {float(r["train/teacher"]) for r in rows} == {7}
    assert average._average_model.module._auxiliary_losses == []
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {f"model.{k}" for k in task.model.state_dict()}


def test_labels_train_both_of_two_heads_and_the_first_alone_beside_a_teacher_of_logits(monkeypatch):
    class Pair(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :3], images.flatten(1)[:, 3:6]

    task, seen = make_task(label_smoothing=0.0), []
    task.model = Pair()
    for name in ("log", "log_dict", "_check_labels"):
        monkeypatch.setattr(task, name, lambda *_, **__: None)
    images, labels = torch.randn(4, 6, 1, 1), torch.tensor([0, 2, 1, 1])
    first, second = (torch.nn.functional.cross_entropy(logits, labels) for logits in task(images))
    torch.testing.assert_close(task.training_step((images, labels), 0), (first + second) / 2)

    def teach(_images, logits):
        seen.append(logits)
        return {"taught": 0.5 * logits.sum()}

    task.add_auxiliary_loss(teach, teaches_logits=True)
    torch.testing.assert_close(task.training_step((images, labels), 0), first + 0.5 * task(images)[1].sum())
    assert torch.equal(seen[0], task(images)[1])
    task.remove_auxiliary_loss(teach)
    torch.testing.assert_close(task.training_step((images, labels), 0), (first + second) / 2)


def test_cutmix_cuts_the_same_rectangle_from_all_frames_of_a_recording(monkeypatch):
    seen = []

    class Network(torch.nn.Module):
        def forward(self, recordings):
            seen.append(recordings)
            return recordings.mean((1, 3, 4))

    task = make_task(label_smoothing=0.0)
    task.model, task._mixup = Network(), Mixup(0.0, 1.0, label_smoothing=0.0, num_classes=2)
    for name in ("log", "log_dict", "_check_labels"):
        monkeypatch.setattr(task, name, lambda *_, **__: None)
    recordings = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1).repeat(1, 3, 2, 16, 16)
    while not (seen and 1 < seen[-1][0].mean() < 2):  # a rectangle may be empty or the whole frame
        task.training_step((recordings.clone(), torch.tensor([0, 1])), 0)
    frames = seen[-1].flatten(1, 2)
    assert torch.equal(frames, frames[:, :1].expand_as(frames))


def test_a_checkpoint_rebuilds_the_task_without_its_data(tmp_path):
    task, trainer = make_task(init_from=None), make_trainer(tmp_path)
    trainer.fit(task, FewDigits())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = ClassificationTask.load_from_checkpoint(tmp_path / "x.ckpt").eval()
    images = torch.randn(2, 1, 16, 16)  # ten classes and one channel came from the data
    torch.testing.assert_close(again(images), task.eval()(images))


def test_training_starts_from_given_weights_which_its_checkpoints_do_not_need(tmp_path):
    source = timm.create_model("qsd_tiny", num_classes=3, in_chans=1, **SMALL)
    torch.save(source.state_dict(), tmp_path / "start.pth")
    task = make_task(init_from=str(tmp_path / "start.pth"), base_lr=0.0, min_lr=0.0)
    trainer = make_trainer(tmp_path)
    trainer.fit(task, FewDigits())
    conv = "stem.downsample.proj.conv.weight"
    assert torch.equal(task.model.get_parameter(conv), source.get_parameter(conv))
    assert task.model.num_classes == 10
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    Path(tmp_path, "start.pth").unlink()
    assert ClassificationTask.load_from_checkpoint(tmp_path / "x.ckpt").hparams["init_from"] is None


def test_gradient_checkpointing_and_compilation_train_the_same_weights(tmp_path):
    trained = []
    for options in ({}, {"grad_checkpointing": True}, {"compile": "eager"}):
        L.seed_everything(1)
        task = make_task(model_args={"depth": 2}, **options)
        # In float64: a neuron that tipped by compiled rounding would send Adam elsewhere.
        make_trainer(tmp_path, max_steps=2, limit_val_batches=0, precision="64-true").fit(task, FewDigits())
        trained.append(task.model.state_dict())
    assert all(torch.equal(v, trained[1][k]) for k, v in trained[0].items())
    assert trained[2].keys() == trained[0].keys()
    for name, value in trained[2].items():
        torch.testing.assert_close(value, trained[0][name], rtol=1e-6, atol=1e-8)


def test_validation_counts_every_image_once(tmp_path):
    task, data = make_task(), FewDigits(batch_size=3)
    metrics = make_trainer(tmp_path).validate(task, data, verbose=False)[0]
    task.eval()
    with torch.no_grad():
        images, labels = (torch.cat(column) for column in zip(*data.val_dataloader()))
        logits = task(images)
    assert metrics["val/accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert metrics["val/accuracy_top5"] == pytest.approx(
        (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    )
    assert metrics["val/loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


# -- neurons of a learned step -----------------------------------------------------------------------------------------

SMALL_CSD = {"embed_dims": 16, "num_heads": 2, "depth": 1}


def csd_task(model="csdformer_4_256", **kwargs):
    return ClassificationTask(
        model, **{"model_args": dict(SMALL_CSD), "optimizer": "adamw", "base_lr": 0.05, "step_lr": 1.0, **kwargs}
    )


class Steps(Callback):
    """Records the neurons' steps behind every batch, and the images of the first."""

    def __init__(self):
        self.seen, self.images = [], None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.images = batch[0] if self.images is None else self.images
        self.seen.append([p.item() for n, p in pl_module.model.named_parameters() if n.endswith("neuron.step")])


def test_steps_come_from_the_first_batch_once(tmp_path):
    L.seed_everything(3)
    steps = Steps()
    frozen = csd_task(base_lr=0.0, min_lr=0.0)
    make_trainer(tmp_path, [steps, EMAWeightAveraging(decay=0.5)]).fit(frozen, FewDigits())
    assert all(seen == steps.seen[0] for seen in steps.seen)  # learning rate 0: nothing else moves them
    assert len(set(steps.seen[0])) > 5  # no longer what the constructor gave
    # without an update the batch norms' statistics alone differ, which initialization does not use
    expected = copy.deepcopy(frozen.model)
    initialize_neurons(expected, steps.images)
    assert [p.item() for n, p in expected.named_parameters() if n.endswith("neuron.step")] == pytest.approx(
        steps.seen[0]
    )


def test_neuron_steps_learn_at_the_step_rate_and_without_decay(tmp_path):
    task = csd_task(step_lr=0.5, weight_decay=0.1)
    trainer = make_trainer(tmp_path, fast_dev_run=True)
    trainer.fit(task, FewDigits())
    neuron = task.model.head_neuron.step
    groups = [g for g in trainer.optimizers[0].param_groups if any(p is neuron for p in g["params"])]
    assert len(groups) == 1
    assert len(groups[0]["params"]) == sum(isinstance(m, LsqNeuron) for m in task.model.modules())
    assert groups[0]["weight_decay"] == 0
    full = max(g["initial_lr"] for g in trainer.optimizers[0].param_groups)
    assert groups[0]["initial_lr"] == pytest.approx(0.5 * full)


def test_a_float_network_s_weights_start_the_quantized_one_and_the_first_batch_its_steps(tmp_path):
    first = csd_task("csdformer_4_256_ann")
    trainer = make_trainer(tmp_path)
    trainer.fit(first, FewDigits())
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    steps = Steps()
    second = csd_task(base_lr=0.0, min_lr=0.0, init_from=str(tmp_path / "float.ckpt"))
    make_trainer(tmp_path, [steps], max_steps=1).fit(second, FewDigits())
    for name, weight in first.model.named_parameters():
        assert torch.equal(weight, second.model.get_parameter(name)), name
    assert len(set(steps.seen[0])) > 5
    # a quantized checkpoint brings its steps along
    second.model.head_neuron.step.data.fill_(0.123)
    second.trainer.save_checkpoint(tmp_path / "quantized.ckpt")
    third = csd_task(base_lr=0.0, min_lr=0.0, init_from=str(tmp_path / "quantized.ckpt"))
    make_trainer(tmp_path, max_steps=1).fit(third, FewDigits())
    assert third.model.head_neuron.step.item() == pytest.approx(0.123)


def test_a_resumed_training_keeps_its_steps_also_if_it_had_not_begun(tmp_path):
    def fit(folder, interrupt=(), resume=None):
        L.seed_everything(5)
        task = csd_task()
        checkpoint = ModelCheckpoint(folder, "last", every_n_train_steps=1, enable_version_counter=False)
        make_trainer(folder, [checkpoint, *interrupt]).fit(task, FewDigits(), ckpt_path=resume)
        return task.model.state_dict()

    whole = fit(tmp_path / "whole")
    with pytest.raises(Interrupted):
        fit(tmp_path / "part", [InterruptAfter(1)])
    resumed = fit(tmp_path / "part", resume=tmp_path / "part" / "last.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())

    task = csd_task(base_lr=0.0, min_lr=0.0)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(task, FewDigits())
    task.model.head_neuron.step.data.fill_(0.321)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    saved.update(global_step=0, epoch=0, optimizer_states=[], lr_schedulers=[], callbacks={})
    del saved["loops"]
    torch.save(saved, tmp_path / "fresh.ckpt")
    other = csd_task(base_lr=0.0, min_lr=0.0)
    make_trainer(tmp_path, max_steps=1).fit(other, FewDigits(), ckpt_path=tmp_path / "fresh.ckpt")
    assert other.model.head_neuron.step.item() == pytest.approx(0.321)


def test_qcfs_keeps_its_fixed_start(tmp_path):
    task = csd_task(model_args={**SMALL_CSD, "activation": "qcfs"}, base_lr=0.0, min_lr=0.0)
    make_trainer(tmp_path, max_steps=1).fit(task, FewDigits())
    assert {p.item() for n, p in task.model.named_parameters() if n.endswith("ceiling")} == {8.0}


@pytest.mark.parametrize(("activation", "parameter"), [("lsq", "step"), ("qcfs", "ceiling")])
def test_a_neuron_s_step_that_is_no_longer_positive_stops_and_is_named(activation, parameter, tmp_path):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 1:
                pl_module.model.blocks[0].attn.q_neuron.get_parameter(parameter).data.fill_(-0.5)

    task = csd_task(model_args={**SMALL_CSD, "activation": activation}, base_lr=1e-9)
    message = (
        r"a step size of model\.blocks\.0\.attn\.q_neuron is -0.5 at step 2, not positive.*lower base_lr or step_lr"
    )
    with pytest.raises(QsdError, match=message):
        make_trainer(tmp_path, [Poison()]).fit(task, FewDigits())


# -- when training must stop ------------------------------------------------------------------------------------------


def test_a_nan_loss_stops_says_where_and_keeps_the_last_good_checkpoint(tmp_path):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                norm = pl_module.model.stages[1].blocks[0].mlp.fc1.norm
                norm.register_forward_hook(lambda m, i, o: o * float("nan"))

    checkpoint = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    with pytest.raises(QsdError) as error:
        make_trainer(tmp_path, [Poison(), checkpoint], max_epochs=5).fit(make_task(), FewDigits())
    message = str(error.value)
    assert "loss is nan at step 3 (epoch 1)" in message
    assert "the output of layer stages.1.blocks.0.mlp.fc1.norm" in message
    assert str(tmp_path / "last.ckpt") in message
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(torch.isfinite(v).all() for v in saved["state_dict"].values())


def test_broken_parameters_are_never_saved(tmp_path):
    task, trainer = make_task(), make_trainer(tmp_path)
    trainer.fit(task, FewDigits())
    task.model.head.weight.data[0, 0] = float("inf")
    with pytest.raises(QsdError, match=r"parameter model\.head\.weight is not finite at step 4; nothing was saved"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "x.ckpt").exists()


def test_a_step_size_that_is_no_longer_positive_stops_and_is_named(tmp_path):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.model.head.quantizer.step.data[3] = -1.0

    with pytest.raises(QsdError, match=r"a step size of model\.head\.quantizer is -1 at step 1, not positive"):
        make_trainer(tmp_path, [Poison()]).fit(make_task(base_lr=1e-9), FewDigits())


def test_rates_that_move_a_step_size_through_zero_end_the_training_in_its_first_epoch(tmp_path):
    message = (
        r"a step size of model\.\S+\.quantizer is -0\.\d+ at step \d, not positive.*try a lower base_lr or step_lr"
    )
    with pytest.raises(QsdError, match=message):
        make_trainer(tmp_path, max_epochs=1).fit(make_task(base_lr=16.0, step_lr=1.0, warmup_epochs=0), FewDigits())


def test_a_classifier_with_fewer_outputs_than_classes_is_refused(tmp_path):
    with pytest.raises(QsdError, match=r"the data has 10 classes \(labels 0 to 9\), the model only num_classes=5"):
        make_trainer(tmp_path).fit(make_task(num_classes=5), FewDigits())


class OneClass(FewDigits):
    num_classes = 1


def test_one_class_is_refused(tmp_path):
    with pytest.raises(QsdError, match=r"num_classes=1, and a classifier needs two or more"):
        make_trainer(tmp_path).validate(make_task(), OneClass(), verbose=False)


def test_a_label_outside_the_classifier_is_named_when_the_data_does_not_declare_its_classes(tmp_path):
    batches = torch.utils.data.DataLoader([(torch.randn(1, 16, 16), label) for label in (0, 1, 7)], batch_size=3)
    task = make_task(num_classes=5, model_args={"in_chans": 1})
    with pytest.raises(QsdError, match=r"label 7 is outside the classifier's num_classes=5"):
        make_trainer(tmp_path).validate(task, batches, verbose=False)


def test_the_number_of_classes_must_come_from_somewhere(tmp_path):
    with pytest.raises(QsdError, match=r"num_classes is not given"):
        make_trainer(tmp_path).validate(make_task(), torch.utils.data.DataLoader([(0, 0)]))


def test_an_unknown_model_is_answered_with_the_nearest_names():
    with pytest.raises(QsdError, match=r"'qsd_15' is unknown to timm; nearest names: qsd_15m"):
        ClassificationTask("qsd_15")


def test_an_endless_training_has_no_schedule(tmp_path):
    with pytest.raises(QsdError, match="length of the training is unknown"):
        make_trainer(tmp_path, max_epochs=-1).fit(make_task(), FewDigits())
