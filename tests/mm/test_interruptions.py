"""A training of mmengine that is stopped, killed or resumed: nothing is lost, nothing is changed without a word."""

import os
import signal

import pytest
import torch
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner

import qsd.mm  # noqa: F401
from qsd import QsdError
from qsd.mm.command import ended_workers
from qsd.mm.hooks import register_training_hooks, stop_hook
from qsd.mm.resuming import check_same_training, checkpoint_to_resume
from qsd.mm.work_dir import only_training_in, own_folder
from tests.helpers import long
from tests.helpers.files import full_disk
from tests.helpers.processes import run_in_two

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]


class Numbers(torch.utils.data.Dataset):
    """A few numbers, each of which is seen in the order of an epoch."""

    def __init__(self, count=7):
        self.count, self.metainfo = count, {"classes": ("a",)}

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"inputs": torch.tensor([[[float(index)]]])}


class Line(BaseModel):
    """A line through the numbers."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.layer.weight, 0.1)
        torch.nn.init.constant_(self.layer.bias, 0.1)
        self.backbone = torch.nn.Identity()
        self.seen = []

    def forward(self, inputs, mode="tensor"):
        inputs = torch.stack(list(inputs)).flatten(1)
        if mode == "loss":
            self.seen.append(inputs.flatten().tolist())
            return {"loss": ((self.layer(inputs / 10) - 1) ** 2).mean()}
        return [{"score": 0.0}]


class Send(Hook):
    """SIGTERM to this process at an iteration, in training or in the validation after it."""

    def __init__(self, iteration, validation=False):
        self.place = iteration, validation

    def before_train_iter(self, runner, *_, **__):
        if (runner.iter, False) == self.place:
            os.kill(os.getpid(), signal.SIGTERM)

    def before_val_iter(self, runner, *_, **__):
        if (runner.iter, True) == self.place:
            os.kill(os.getpid(), signal.SIGTERM)


def train(
    folder,
    *hooks,
    resume=None,
    by_epoch=True,
    accumulate=1,
    batch=2,
    count=7,
    checkpoint=None,
    run=True,
    launcher="none",
    workers=0,
):
    """Train for two epochs of four batches, and return the Runner."""
    loop = {"by_epoch": True, "max_epochs": 2} if by_epoch else {"by_epoch": False, "max_iters": 8, "val_interval": 4}
    if by_epoch:
        loop["type"] = "EpochBasedTrainLoop"
    loader = {"dataset": Numbers(count), "batch_size": batch, "num_workers": workers}
    shuffled = {"type": "DefaultSampler" if by_epoch else "InfiniteSampler", "shuffle": True}
    loop = {key: value for key, value in loop.items() if not (by_epoch and key == "by_epoch")}
    runner = Runner(
        model=Line(),
        work_dir=str(folder),
        train_dataloader={**loader, "sampler": shuffled},
        val_dataloader={**loader, "sampler": {"type": "DefaultSampler", "shuffle": False}},
        val_evaluator=[],
        train_cfg=loop,
        val_cfg={},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}, "accumulative_counts": accumulate},
        param_scheduler=[{"type": "LinearLR", "start_factor": 0.1, "end": 8, "by_epoch": False}],
        default_hooks={
            "checkpoint": {"type": "CheckpointHook", "interval": 1, "by_epoch": by_epoch, **(checkpoint or {})}
        },
        custom_hooks=list(hooks),
        resume=resume is not None,
        load_from=resume and str(resume),
        randomness={"seed": 5},
        experiment_name=os.urandom(4).hex(),
        visualizer={"type": "Visualizer", "name": os.urandom(4).hex()},
        default_scope="mmengine",
        launcher=launcher,
        cfg={"model_wrapper_cfg": {"type": "MMDistributedDataParallel", "device_ids": None}},
    )
    register_training_hooks(runner)
    if run:
        stop_hook(runner).begin()
        try:
            runner.train()
        finally:
            stop_hook(runner).end()
    return runner


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("options", [{}, {"by_epoch": False}, {"accumulate": 3}], ids=str)
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, options, averaged, capsys):
    def average():
        return [EMAHook(momentum=0.5)] if averaged else []

    whole = train(tmp_path / "whole", *average(), **options).model
    for iteration, validation in [(1, False), (3, False), (4, True), (6, False)]:
        folder = tmp_path / f"{iteration} {validation}"
        with pytest.raises(SystemExit) as ended:
            train(folder, *average(), Send(iteration, validation), **options)
        assert ended.value.code == 143
        path = folder / "interrupted.pth"
        assert f"stopped by SIGTERM; go on with --resume {path}" in capsys.readouterr().err
        assert checkpoint_to_resume(folder) == str(path)
        resumed = train(folder, *average(), resume=path, **options).model
        done = iteration if validation else iteration + 1
        assert resumed.seen == whole.seen[done:], (iteration, validation)
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


@long
def test_gradients_of_accumulated_batches_are_kept_for_several_processes(tmp_path):
    run_in_two("accumulate_in_two.py", tmp_path, timeout=100)


@pytest.mark.parametrize("by_epoch", [True, False])
def test_another_order_of_images_is_refused(tmp_path, by_epoch):
    with pytest.raises(SystemExit):
        train(tmp_path, Send(1), by_epoch=by_epoch)
    for change, message in [({"batch": 1}, "batch_size=1 instead of 2"), ({"count": 8}, "images=8 instead of 7")]:
        with pytest.raises(QsdError, match=message):
            train(tmp_path, resume=tmp_path / "interrupted.pth", by_epoch=by_epoch, **change)


def test_averages_go_on_with_averaging_alone(tmp_path):
    train(tmp_path / "averaged", EMAHook(momentum=0.5))
    with pytest.raises(QsdError, match="add the EMAHook"):
        train(tmp_path / "raw", resume=tmp_path / "averaged/epoch_1.pth")
    train(tmp_path / "plain")
    train(tmp_path / "later", EMAHook(momentum=0.5), resume=tmp_path / "plain/epoch_1.pth")


def test_a_data_loading_process_that_the_system_ends_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(Numbers, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    match = r"data-loading process was ended .*lower train_dataloader"
    with pytest.raises(QsdError, match=match) as error, ended_workers("train"):
        train(tmp_path, workers=1)
    assert "\n" not in str(error.value)


class FailAt(Hook):
    """A full disk while the second checkpoint is written."""

    priority = "HIGH"

    def after_train_epoch(self, runner):
        if runner.epoch == 1:
            self.disk = full_disk()
            self.disk.__enter__()


def test_a_full_disk_leaves_the_old_files_and_gives_one_line(tmp_path):
    fault = FailAt()

    def fill():
        try:
            train(tmp_path, fault, checkpoint={"max_keep_ckpts": 1})
        finally:
            fault.disk.__exit__(None, None, None)

    with pytest.raises(QsdError, match=r"epoch_2.pth cannot be written: .*No space left on device") as error:
        fill()
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.rglob("*.pth")] == ["epoch_1.pth"]
    assert checkpoint_to_resume(tmp_path) == str(tmp_path / "epoch_1.pth")


def test_checkpoints_are_removed_after_their_successors_are_complete_and_never_those_of_other_runs(tmp_path):
    assert HOOKS.get("CheckpointHook") is not CheckpointHook
    runner = train(tmp_path / "a", checkpoint={"max_keep_ckpts": 1, "save_best": "score", "rule": "greater"}, run=False)
    hook = next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
    present = []

    def save(out_dir, filename, *_, **__):
        present.append({path.name for path in (tmp_path / "a").glob("*.pth")})
        (tmp_path / "a" / filename).write_bytes(b"")

    runner.save_checkpoint = save
    hook.before_train(runner)
    for score in (0.1, 0.2):
        hook._save_best_checkpoint(runner, {"score": score})
        runner.train_loop._epoch += 1
    hook._save_best_checkpoint(runner, {"score": 0.15})
    assert present == [set(), {"best_score_epoch_0.pth"}]
    assert {path.name for path in (tmp_path / "a").glob("*.pth")} == {"best_score_epoch_1.pth"}
    assert hook.best_ckpt_path == str(tmp_path / "a" / "best_score_epoch_1.pth")
    (tmp_path / "other.pth").touch()
    hook.best_ckpt_path = str(tmp_path / "other.pth")
    hook._save_best_checkpoint(runner, {"score": 0.3})
    assert (tmp_path / "other.pth").exists()


def test_a_folder_belongs_to_one_training(tmp_path):
    with only_training_in(tmp_path / "a", goes_on=False):
        with pytest.raises(QsdError, match="another training is running in"), only_training_in(tmp_path / "a", True):
            pass
        (tmp_path / "a" / "epoch_1.pth").touch()
    with pytest.raises(QsdError, match="go on with it by --resume"), only_training_in(tmp_path / "a", False):
        pass
    with only_training_in(tmp_path / "a", goes_on=True):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(QsdError, match="cannot be written"), only_training_in(tmp_path / "file" / "x", False):
        pass


def test_a_folder_that_nobody_chose_is_a_new_one(tmp_path, capsys):
    default = tmp_path / "runs" / "coco"
    assert own_folder(default, None) == own_folder(default, "auto") == str(default)
    for number, name in enumerate(["coco", "coco-1", "coco-2"]):
        assert own_folder(default, None) == str(default.with_name(name))
        default.with_name(name).mkdir(parents=True)
        (default.with_name(name) / "epoch_1.pth").touch()
        os.utime(default.with_name(name), (number, number))
    assert "belongs to another training" in capsys.readouterr().out
    assert own_folder(default, "auto") == str(default.with_name("coco-2"))
    assert own_folder(default, str(default.with_name("coco-1") / "epoch_1.pth")) == str(default.with_name("coco-1"))
    assert own_folder(default, "elsewhere/epoch_1.pth") == str(default)


def test_another_optimizer_or_schedule_is_refused(tmp_path):
    settings = {"optim_wrapper": {"optimizer": {"lr": 0.1, "betas": (0.9, 0.99)}}, "param_scheduler": [{"end": 8}]}
    text = "\n".join(f"{key} = {value!r}" for key, value in settings.items())
    content = {"meta": {"cfg": text}}
    check_same_training(content, settings, "a.pth")
    for change, message in [
        ({"optim_wrapper": {"optimizer": {"lr": 0.2, "betas": [0.9, 0.99]}}}, r"optimizer.lr=0.1, and not 0.2"),
        ({"param_scheduler": [{"end": 9}]}, r"param_scheduler.0.end=8, and not 9"),
        ({"param_scheduler": []}, r"param_scheduler=\[{'end': 8}\], and not \[\]"),
    ]:
        with pytest.raises(QsdError, match=message):
            check_same_training(content, {**settings, **change}, "a.pth")
    check_same_training({"meta": {"cfg": "import os"}}, settings, "a.pth")
