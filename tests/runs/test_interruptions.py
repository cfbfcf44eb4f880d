"""A training that is stopped, killed or resumed: nothing is lost, nothing is changed without a word."""

import signal
import subprocess

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from qsd import QsdError
from qsd.runs import SaveOnStop, WholeFileCheckpointIO, newest_checkpoint, write_whole_files
from tests.helpers import sample
from tests.helpers.files import full_disk
from tests.helpers.linear import Digits, Linear, Send, fit

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]
INTERRUPTED = "checkpoints/interrupted.ckpt"


def same(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


# Within an epoch, in its last batch, in a validation, in the very last batch and the very last validation.
PLACES = [(0, 0, False), (1, 1, True), (2, 2, False)]
PLACES = sample(PLACES, [*PLACES, (1, 1, False), (1, 2, False), (1, 0, True), (2, 1, True)])


WHOLE = [
    (options, averaged) for options in ({}, {"max_steps": 9}, {"accumulate_grad_batches": 2}) for averaged in (0, 1)
]


@pytest.mark.parametrize(
    ("options", "averaged"), sample([({}, 1), ({"accumulate_grad_batches": 2}, 0)], WHOLE), ids=str
)
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, options, averaged):
    def average():
        return [EMAWeightAveraging(decay=0.5, use_buffers=True)] if averaged else []

    if "max_steps" in options:
        options = {**options, "max_epochs": -1}
    whole = fit(tmp_path / "whole", *average(), **options)
    for epoch, batch, validation in PLACES:
        folder, watch = tmp_path / f"{epoch} {batch} {validation}", SaveOnStop()
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SIGTERMException):
            fit(folder, *average(), Send(epoch, batch, validation), watch=watch, **options)
        assert signal.getsignal(signal.SIGTERM) == handler
        assert watch.message == f"stopped by SIGTERM; go on with --ckpt_path {folder / INTERRUPTED}"
        assert newest_checkpoint([folder]) == folder / INTERRUPTED
        resumed = fit(tmp_path / "resumed", *average(), resume=folder / INTERRUPTED, **options)
        if not (averaged and "max_steps" in options and epoch == 2):  # No step is left: the averages stay in the file.
            assert same(whole, resumed), (epoch, batch, validation)
        assert resumed.trainer.global_step == whole.trainer.global_step


def test_ctrl_c_saves_too_and_the_second_one_does_not_wait(tmp_path):
    watch = SaveOnStop()
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path, Send(1, 0, number=signal.SIGINT), watch=watch)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from here on
    assert isinstance(ended.value.__context__, KeyboardInterrupt)
    assert "stopped by Ctrl-C; go on with" in watch.message
    assert (tmp_path / INTERRUPTED).is_file()
    with pytest.raises(SystemExit):
        fit(tmp_path / "second", Send(1, 0, number=signal.SIGINT), Send(1, 0, number=signal.SIGINT), watch=watch)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert not (tmp_path / "second" / INTERRUPTED).exists()


def test_a_full_disk_leaves_the_old_checkpoint_and_gives_one_line(tmp_path):
    fit(tmp_path, max_epochs=1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    with full_disk(), pytest.raises(QsdError, match=r"last.ckpt cannot be written: .*No space left on device") as error:
        fit(tmp_path / "second", resume=last, limit_val_batches=0)
    assert "\n" not in str(error.value)
    way = WholeFileCheckpointIO()
    with full_disk(), pytest.raises(QsdError, match="cannot be written"):
        way.save_checkpoint({"a": torch.zeros(5000)}, last)
    assert last.read_bytes() == before
    watch = SaveOnStop()
    with full_disk(), pytest.raises(SIGTERMException):
        fit(tmp_path / "third", Send(0), watch=watch)
    assert "stopped by SIGTERM, but no checkpoint could be saved" in watch.message
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"last.ckpt", "best.ckpt"}


def test_a_checkpoint_is_written_beside_its_target_and_not_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    module = fit(tmp_path, max_epochs=1)
    assert type(module.trainer.strategy.checkpoint_io) is WholeFileCheckpointIO
    # an address, and a way that the user chose, stay
    asked = []
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", lambda *args, **kwargs: asked.append(args))
    WholeFileCheckpointIO().save_checkpoint({}, "memory://a/b.ckpt")
    assert len(asked) == 1


CHANGES = [
    ({"data": Digits(batch_size=3)}, "batch_size=3 instead of 4"),
    ({"accumulate_grad_batches": 3}, "accumulate_grad_batches=1"),
    ({"data": Digits(images=13)}, "images=13 instead of 14"),
    ({"data": Digits(seed=4)}, "seed=4 instead of 3"),
]


@pytest.mark.parametrize(("change", "message"), sample(CHANGES[:2], CHANGES), ids=lambda value: str(value)[:20])
def test_another_order_of_images_is_refused_within_an_epoch_and_honoured_at_its_end(tmp_path, change, message):
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Send(1, 1))
    with pytest.raises(QsdError, match=message) as error:
        fit(tmp_path / "second", resume=tmp_path / INTERRUPTED, **change)
    assert "\n" not in str(error.value)
    end = fit(tmp_path / "third", resume=tmp_path / "checkpoints" / "last.ckpt", **change)
    assert end.trainer.current_epoch == 3


def test_averages_go_on_with_averaging_alone(tmp_path):
    fit(tmp_path / "averaged", EMAWeightAveraging(decay=0.5), max_epochs=1)
    with pytest.raises(QsdError, match="add the callback EMAWeightAveraging"):
        fit(tmp_path / "raw", resume=tmp_path / "averaged/checkpoints/last.ckpt")
    # the other way round, averages start from the weights
    fit(tmp_path / "plain", max_epochs=1)
    fit(tmp_path / "later", EMAWeightAveraging(decay=0.5), resume=tmp_path / "plain/checkpoints/last.ckpt")
    saved = torch.load(tmp_path / "later/checkpoints/last.ckpt", weights_only=True)
    assert "current_model_state" in saved


@pytest.mark.parametrize("fate", ["stays", "moved", "gone"])
def test_a_resumed_training_remembers_its_best_checkpoint(tmp_path, fate):
    scores = [0.5, 0.6, 0.7, 0.4]
    fit(tmp_path / "first", module=Linear(scores), max_epochs=1)
    best = tmp_path / "first/checkpoints/best.ckpt"
    if fate == "moved":
        (tmp_path / "first").rename(tmp_path / "moved")
        best = tmp_path / "moved/checkpoints/best.ckpt"
    elif fate == "gone":
        best.unlink()
    resume = best.with_name("last.ckpt")
    module = fit(tmp_path / "second", resume=resume, module=Linear(scores), max_epochs=3)
    callback = module.trainer.checkpoint_callback
    if fate == "gone":
        assert callback.best_model_path == str(tmp_path / "second/checkpoints/best.ckpt")
        assert callback.best_model_score == pytest.approx(0.6)
        return
    assert callback.best_model_path == str(best)
    assert callback.best_model_score == 0.5
    third = fit(
        tmp_path / "third", resume=tmp_path / "second/checkpoints/last.ckpt", module=Linear(scores), max_epochs=4
    )
    assert third.trainer.checkpoint_callback.best_model_path == str(tmp_path / "third/checkpoints/best.ckpt")
    assert best.is_file()  # of another run


def test_data_loading_processes_leave_signals_to_the_training(tmp_path):
    data = Digits(num_workers=1)
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    (worker,) = loader._iterator._workers
    for name in ("TERM", "INT"):  # not from this process, whose SIGTERM ends its loading processes
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len(list(batches)) == len(loader) - 1


def test_a_way_that_removes_checkpoints_before_their_successors_are_complete_is_refused():
    trainer = L.Trainer(accelerator="cpu", devices=1, plugins=[AsyncCheckpointIO()], logger=False)
    with pytest.raises(QsdError, match="AsyncCheckpointIO removes a checkpoint before the next one is complete"):
        write_whole_files(trainer)
