"""Distillation as a callback, with averaging, resuming, accumulation, precisions, compilation and processes."""

import csv
from pathlib import Path

import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from qsd import QsdError, cli
from qsd.callbacks import Distillation, SpikeStatistics
from tests.helpers import ROOT, long
from tests.helpers.training import FewDigits, InterruptAfter, Interrupted, make_task, make_trainer

TERMS = ("train/loss_query", "train/loss_key", "train/loss_value", "train/loss_logits")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The checkpoint of a float twin that has seen a few digits, whole: our own training writes it."""
    folder = tmp_path_factory.mktemp("teacher")
    L.seed_everything(11)
    trainer = make_trainer(folder, [ModelCheckpoint(folder, "teacher")], max_epochs=1, limit_val_batches=0)
    task = make_task()
    task.hparams["model"] = "qsd_tiny_ann"
    trainer.fit(task, FewDigits())
    return str(folder / "teacher.ckpt")


def distil(teacher, **arguments):
    return Distillation(teacher, **{"attention_weight": 0.5, "logits_weight": 2.0, **arguments})


def logged(folder, task=None, callbacks=(), **options):
    """Train, and return what was logged of every step."""
    logger = CSVLogger(folder)
    options = {"max_epochs": 1, "limit_val_batches": 0, "log_every_n_steps": 1, **options}
    make_trainer(folder, callbacks, logger=logger, **options).fit(task or make_task(), FewDigits())
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


def hooks(network):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def test_every_term_is_logged_as_it_enters_the_loss(teacher, tmp_path):
    task, callback = make_task(), distil(teacher)
    rows = logged(tmp_path, task, [callback], max_epochs=2)
    assert len(rows) == 4
    for row in rows:
        terms = [float(row[name]) for name in ("train/loss_task", *TERMS)]
        assert all(term > 0 for term in terms)
        assert float(row["train/loss"]) == pytest.approx(sum(terms), rel=1e-4)
        # two layers of two heads, each at most 2 apart, at weight 0.5
        assert all(term <= 0.5 * 2 * 2 * 2 for term in terms[1:4])


def test_what_is_distilled_comes_closer(teacher, tmp_path):
    L.seed_everything(0)
    rows = logged(tmp_path, make_task(base_lr=0.3), [distil(teacher, logits_weight=0)], max_epochs=12)
    for name in TERMS[:3]:
        assert float(rows[-1][name]) < 0.85 * float(rows[0][name])
    assert not rows[0].get("train/loss_logits")


def test_nothing_of_it_is_left_behind_after_training_or_an_error(teacher, tmp_path):
    task, callback = make_task(), distil(teacher)
    logged(tmp_path, task, [callback])
    assert hooks(task.model) == 0
    assert task._auxiliary_losses == []
    assert callback.terms is None
    rows = logged(tmp_path, task, [callback])  # a second training is distilled once, not twice
    assert float(rows[0]["train/loss_query"]) > 0
    with pytest.raises(Interrupted):
        make_trainer(tmp_path, [callback, InterruptAfter(1)]).fit(task, FewDigits())
    assert hooks(task.model) == 0
    assert task._auxiliary_losses == []
    make_trainer(tmp_path, [callback]).validate(task, FewDigits(), verbose=False)
    assert hooks(task.model) == 0


def sizes(value):
    """The structure of a checkpoint: keys, and shapes in place of tensors."""
    if isinstance(value, dict):
        return {key: sizes(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [sizes(entry) for entry in value]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


class NoTeacher(Callback):
    """Look for the teacher wherever Lightning keeps or copies modules."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (callback,) = (c for c in trainer.callbacks if isinstance(c, Distillation))
        averages = [c._average_model for c in trainer.callbacks if isinstance(c, EMAWeightAveraging)]
        theirs = {id(m) for m in callback.terms.teacher.network.modules()}
        for holder in (pl_module, trainer.model, *averages):
            assert not any(id(m) in theirs for m in holder.modules())
        twins = [m for a in averages for m in a.modules() if getattr(m, "time_steps", 4) is None]
        assert twins == []  # no copy either
        assert [n for n, m in callback.terms.teacher.network.named_modules() if m.training] == []
        self.checked = True


@pytest.mark.parametrize("average_first", [True, False])
def test_checkpoints_averages_and_optimiser_know_nothing_of_the_teacher(teacher, tmp_path, average_first):
    saved = []
    for distils in (False, True):
        folder, watch = tmp_path / str(distils), NoTeacher()
        callbacks = [EMAWeightAveraging(decay=0.5, use_buffers=True), *([distil(teacher)] if distils else [])]
        callbacks = callbacks if average_first else callbacks[::-1]
        checkpoint = ModelCheckpoint(folder, "x", enable_version_counter=False)
        task = make_task()
        make_trainer(folder, [*callbacks, checkpoint, *([watch] if distils else [])], max_epochs=1).fit(
            task, FewDigits()
        )
        saved.append(torch.load(folder / "x.ckpt", weights_only=True))
        assert sum(p.numel() for g in task.trainer.optimizers[0].param_groups for p in g["params"]) == sum(
            p.numel() for p in task.parameters()
        )
    assert watch.checked
    without, with_teacher = (sizes({k: v for k, v in s.items() if k != "callbacks"}) for s in saved)
    assert without == with_teacher
    assert len(saved[0]["callbacks"]) == len(saved[1]["callbacks"]) == 2  # the average and the checkpoint
    files = [(tmp_path / str(distils) / "x.ckpt").stat().st_size for distils in (False, True)]
    assert abs(files[0] - files[1]) < 2048


def test_students_with_and_without_a_teacher_start_alike(teacher, tmp_path):
    losses = []
    for callbacks in ([], [distil(teacher)]):
        L.seed_everything(3)
        rows = logged(tmp_path / str(len(callbacks)), make_task(base_lr=0.0, min_lr=0.0), callbacks)
        losses.append([row.get("train/loss_task") or row["train/loss"] for row in rows])
    assert losses[0] == losses[1]


def _fit(folder, teacher, interrupt_after=None, resume=None):
    L.seed_everything(5)
    task = make_task(mixup=0.5, model_args={"drop_path_rate": 0.3})
    schedule = [(0.0, 1.0), (0.8, 0.1)]
    callbacks = [
        EMAWeightAveraging(decay=0.8, use_buffers=True),
        ModelCheckpoint(
            folder, "last", every_n_train_steps=1, save_on_train_epoch_end=False, enable_version_counter=False
        ),
        distil(teacher, attention_weight=schedule),
    ]
    if interrupt_after is not None:
        callbacks.append(InterruptAfter(interrupt_after))
    make_trainer(folder, callbacks, max_epochs=3).fit(task, FewDigits(), ckpt_path=resume)
    return task


def test_an_interrupted_and_resumed_distillation_ends_with_the_same_bits(teacher, tmp_path):
    whole = _fit(tmp_path / "whole", teacher)
    with pytest.raises(Interrupted):
        _fit(tmp_path / "part", teacher, interrupt_after=3)
    torch.manual_seed(99)
    resumed = _fit(tmp_path / "part", teacher, resume=tmp_path / "part" / "last.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name


class FreezeAndRecord(Callback):
    def on_train_batch_start(self, trainer, pl_module, *_):
        for module in pl_module.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {n: p.grad.clone() for n, p in pl_module.model.named_parameters()}


def test_accumulated_batches_give_the_gradients_of_one_batch(teacher, tmp_path):
    # A loss that is added in `on_before_backward` would come out twice as large here.
    gradients = []
    for batch_size in (8, 4):
        L.seed_everything(2)
        record = FreezeAndRecord()
        make_trainer(
            tmp_path,
            [record, distil(teacher)],
            max_steps=1,
            precision="64-true",
            accumulate_grad_batches=8 // batch_size,
            limit_val_batches=0,
        ).fit(make_task(label_smoothing=0.0), FewDigits(batch_size))
        gradients.append(record.gradients)
    for name, gradient in gradients[0].items():
        assert gradient.dtype == torch.float64
        assert (gradient - gradients[1][name]).abs().max() <= 1e-9 * max(1, gradient.abs().max()), name


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(teacher, tmp_path, precision):
    L.seed_everything(0)
    rows = logged(tmp_path / precision, make_task(base_lr=0.0, min_lr=0.0), [distil(teacher)], precision=precision)
    assert all(0 < float(row[name]) < 10 for row in rows for name in TERMS)
    assert len(rows) == 2  # as in float32: none was left out


@long
def test_compiled_checkpointed_and_averaged_students_are_distilled_alike(teacher, tmp_path):
    found = []
    for options in ({}, {"compile": "eager"}, {"grad_checkpointing": True}):
        L.seed_everything(1)
        task = make_task(base_lr=1e-3, model_args={"depth": 2}, **options)
        callbacks = [EMAWeightAveraging(decay=0.5, use_buffers=True), distil(teacher), SpikeStatistics()]
        # a validation comes first: the teacher is asleep, and the student's hooks must survive its compilation
        folder = tmp_path / str(len(found))
        rows = logged(folder, task, callbacks, limit_val_batches=1, precision="64-true")  # rounding tips no neuron
        with (folder / "lightning_logs/version_0/metrics.csv").open() as file:
            rates = [row["spikes/rate"] for row in csv.DictReader(file) if row["spikes/rate"]]
        assert len(rates) == 1
        found.append([float(row[name]) for row in rows for name in ("train/loss", *TERMS)] + [float(rates[0])])
        assert hooks(task.model) == 0
    for values in found[1:]:
        assert values == pytest.approx(found[0], rel=1e-6, abs=1e-9)


def test_a_teacher_of_logits_alone_is_compiled_with_its_student(teacher, tmp_path):
    found, compiled = [], []

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            compiled.append(callback.terms.teacher.network._compiled_call_impl is not None)

    for options in ({}, {"compile": "eager"}):
        L.seed_everything(1)
        callback = distil(teacher, attention_weight=0.0)
        folder = tmp_path / str(len(found))
        rows = logged(folder, make_task(**options), [callback, Watch()], precision="64-true")  # rounding tips no neuron
        found.append([float(row["train/loss_logits"]) for row in rows])
    assert compiled == [False, True]
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_weights_follow_their_schedule_and_the_teacher_rests_while_they_are_zero(teacher, tmp_path):
    calls = []

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            (callback,) = (c for c in trainer.callbacks if isinstance(c, Distillation))
            callback.terms.teacher.network.register_forward_hook(lambda *_: calls.append(trainer.global_step))

    schedule = [(0.25, 0.0), (0.75, 1.0)]
    callback = distil(teacher, attention_weight=schedule, logits_weight=0)
    task = make_task(base_lr=0.0, min_lr=0.0)
    rows = logged(tmp_path, task, [callback, Watch()], max_epochs=4)  # eight steps
    weights = [min(max((step / 8 - 0.25) / 0.5, 0), 1) for step in range(8)]
    assert calls == [step for step, weight in enumerate(weights) if weight]
    values = [float(row["train/loss_query"] or 0) for row in rows]
    assert all((value > 0) == (weight > 0) for value, weight in zip(values, weights))
    assert values[4] / values[6] == pytest.approx(0.5, rel=0.5)  # other images, weights 0.5 and 1


def test_a_vision_transformer_of_timm_teaches_and_sees_its_own_normalisation(tmp_path):
    network = timm.create_model("test_vit", num_classes=10, img_size=32)
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    seen = []

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            (callback,) = (c for c in trainer.callbacks if isinstance(c, Distillation))
            callback.terms.teacher.network.register_forward_pre_hook(lambda _, images: seen.append(images[0]))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batch = batch[0]

    watch = Watch()
    data = FewDigits()
    callback = Distillation("test_vit", str(tmp_path / "vit.pth"), {"img_size": 32, "dynamic_img_size": False})
    task = make_task()
    make_trainer(tmp_path, [callback, watch], max_steps=1, limit_val_batches=0).fit(task, data)
    pixels = watch.batch * data.std[0] + data.mean[0]
    expected = torch.nn.functional.interpolate((pixels - 0.5) / 0.5, (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen[-1], expected.expand(-1, 3, -1, -1), rtol=1e-4, atol=1e-5)


def test_a_csdformer_learns_from_its_float_twin(tmp_path):
    # its neurons' steps are set in a forward pass of its own before the first batch
    sizes = {"embed_dims": 16, "num_heads": 2}
    twin = timm.create_model("csdformer_2_384_ann", num_classes=10, in_chans=1, **sizes)
    torch.save(twin.state_dict(), tmp_path / "twin.pth")
    callback = Distillation("csdformer_2_384_ann", str(tmp_path / "twin.pth"), {**sizes, "in_chans": 1})
    task = make_task()
    task.hparams["model"], task.hparams["model_args"] = "csdformer_2_384", dict(sizes)
    rows = logged(tmp_path, task, [callback])
    assert len(rows) == 2
    assert all(float(row[name]) > 0 for row in rows for name in TERMS[:3])


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_weight": -1.0}, "attention_weight=-1.0 is negative"),
        ({"attention_weight": 0.0, "logits_weight": 0.0}, "nothing is distilled"),
        ({"logits_weight": [(0.5, 1.0), (0.2, 1.0)]}, "ascending shares from 0 to 1"),
        ({"logits_weight": []}, "ascending shares from 0 to 1"),
        ({"temperature": 0.0}, "temperature=0.0 is not positive"),
        ({"logits_kind": "firm"}, "logits_kind='firm' is unknown"),
        ({"teacher_mean": (0.5,)}, "teacher_mean and teacher_std belong together"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(QsdError, match=message):
        distil("teacher.ckpt", **arguments)


def test_a_teacher_of_other_classes_cannot_teach_logits_but_attention(teacher, tmp_path):
    task = make_task(num_classes=12)
    with pytest.raises(QsdError, match=r"has 10 classes, the student 12: .*logits_weight=0"):
        make_trainer(tmp_path, [distil(teacher)]).fit(task, FewDigits())
    logged(tmp_path, make_task(num_classes=12), [distil(teacher, logits_weight=0)])


def test_a_student_without_attention_is_named(teacher, tmp_path):
    task = make_task()
    task.hparams["model"], task.hparams["model_args"] = "resnet10t", {}
    with pytest.raises(QsdError, match=r"the student, a ResNet, has no attention with q_neuron.*attention_weight=0"):
        make_trainer(tmp_path, [distil(teacher)]).fit(task, FewDigits())


def test_a_task_that_takes_no_losses_is_named(teacher, tmp_path):
    class Other(L.LightningModule):
        pass

    with pytest.raises(QsdError, match="Other takes no further losses"):
        Distillation(teacher).setup(None, Other(), "fit")


def test_grids_that_cannot_be_matched_are_named_before_anything_is_written(teacher, tmp_path):
    task = make_task(model_args={"strides": (2, 2, 2, 2, 1)})  # a single token from 16 pixels
    checkpoint = ModelCheckpoint(tmp_path, "x")
    with pytest.raises(QsdError, match="a single token resembles only itself"):
        make_trainer(tmp_path, [distil(teacher), checkpoint]).fit(task, FewDigits())
    assert not (tmp_path / "x.ckpt").exists()


def test_on_the_command_line_a_missing_teacher_gives_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.callbacks+=qsd.callbacks.Distillation", "--trainer.callbacks.init_args.teacher=nothing.ckpt"]
    assert cli.main(["fit", "--config", str(ROOT / "configs/digits.yaml"), *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qsd: error")]
    assert lines == ["qsd: error: checkpoint nothing.ckpt does not exist. (--traceback shows where)"]
