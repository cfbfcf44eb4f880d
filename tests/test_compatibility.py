"""Files of version 0.1.0: they load, give the same logits, and their trainings go on."""

import copy
import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file

import qsd
from qsd import QsdError, report
from qsd.distillation import build_teacher
from qsd.packing import read_notes
from qsd.tasks import ClassificationTask, load_task
from tests.helpers.training import FewDigits, make_trainer
from tests.helpers.version_0_1_0 import FOLDER, moments, parameters, present, unpacked

CLASSIFIERS = ["qsd", "csdformer"]
STEPS = ("quantizer.step", "neuron.step", "neuron1.step", "neuron2.step")


def logits(name):
    return load_file(FOLDER / f"{name}_logits.safetensors")


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_a_checkpoint_gives_the_same_logits(name, tmp_path):
    expected = logits(name)
    network = load_task(unpacked(f"{name}.ckpt", tmp_path)).model.eval()
    torch.testing.assert_close(network(expected["images"]), expected["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_packed_files_give_the_same_logits(name, tmp_path):
    expected = logits(name)
    network = qsd.load_packed(unpacked(f"{name}_trained.safetensors", tmp_path))
    wanted = expected.get("trained_logits", expected["logits"])
    torch.testing.assert_close(network(expected["images"]), wanted, rtol=1e-5, atol=1e-6)
    spiking = qsd.load_packed(unpacked(f"{name}_spiking.safetensors", tmp_path))
    found = spiking.simulate(expected["images"]).logits
    torch.testing.assert_close(found, expected["spiking_logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_an_onnx_file_of_integers_gives_the_same_logits(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    expected = logits(name)
    session = runtime.InferenceSession(unpacked(f"{name}.int8.onnx", tmp_path))
    (found,) = session.run(["logits"], {"images": expected["images"].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected["onnx_logits"], rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_a_float_twin_teaches_the_same(tmp_path):
    expected = logits("teacher")
    teacher = build_teacher(str(unpacked("teacher.ckpt", tmp_path)), None, None)
    found, _ = teacher(expected["images"], None, attention=False)
    torch.testing.assert_close(found, expected["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_record_of_a_conversion_becomes_a_page(name):
    path = FOLDER / f"{name}_conversion.json"
    record, written = report.Record.read(path), json.loads(path.read_text())
    assert record.model.name == written["model"]["name"]
    assert record.energy.total_mj.model_dump(exclude_unset=True) == written["energy"]["total_mj"]
    assert record.model.name in report.html(record)


# -- resuming ---------------------------------------------------------------------------------------------------------


class Resumed(Callback):
    """The optimizer's first moments by name, before the first step after resuming."""

    def __init__(self):
        self.moments = None

    def on_train_batch_start(self, trainer, task, *_):
        if self.moments is None:
            state = trainer.optimizers[0].state
            self.moments = {name: state[p]["exp_avg"].clone() for name, p in task.named_parameters() if p in state}


def resume(path, folder, callbacks=(), change=lambda arguments: None):
    checkpoint = torch.load(path, weights_only=True)
    arguments = copy.deepcopy(dict(checkpoint["hyper_parameters"]))
    change(arguments)
    task = ClassificationTask(**arguments)
    saved = ModelCheckpoint(folder, "last", every_n_train_steps=1, enable_version_counter=False)
    trainer = make_trainer(folder, [EMAWeightAveraging(decay=0.3, use_buffers=True), saved, *callbacks], max_epochs=3)
    trainer.fit(task, FewDigits(), ckpt_path=path)
    return task, trainer


def groups_of_version_0_1_0(state_dict):
    """Without decay and no step sizes; step sizes; with decay: each in the order of the state dict."""
    names = parameters(state_dict)
    steps = [name for name in names if name.endswith(STEPS)]
    exempt = [n for n, t in names.items() if n not in steps and (t.dim() <= 1 or "layer_scale" in n)]
    return [exempt, steps, [name for name in names if name not in {*steps, *exempt}]]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_training_goes_on_with_each_parameter_s_own_optimizer_state(name, tmp_path):
    path = unpacked(f"{name}.ckpt", tmp_path)
    old = torch.load(path, weights_only=True)
    expected = moments(groups_of_version_0_1_0(old["state_dict"]), old["optimizer_states"][0])
    seen = Resumed()
    task, trainer = resume(path, tmp_path / "run", [seen])
    assert seen.moments.keys() == {present(key) for key in expected}
    for key, moment in expected.items():
        assert torch.equal(seen.moments[present(key)], moment), key
    assert trainer.global_step == 6
    assert all(torch.isfinite(p).all() for p in task.parameters())

    # The files of today have names, and go on by them wherever a parameter stands.
    new = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    (state,) = new["optimizer_states"]
    names = [key for group in state["param_groups"] for key in group["param_names"]]
    assert sorted(names) == sorted(key for key, _ in task.named_parameters())


def test_a_state_with_names_is_restored_whatever_its_order(tmp_path):
    path = unpacked("csdformer.ckpt", tmp_path)
    resume(path, tmp_path / "run")
    new = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    (state,) = new["optimizer_states"]
    names = [key for group in state["param_groups"] for key in group["param_names"]]
    expected = {key: state["state"][index]["exp_avg"] for index, key in enumerate(names)}
    for group in state["param_groups"]:  # the same state, written by a model with another order of parameters
        group["params"].reverse()
        group["param_names"].reverse()
    state["param_groups"].reverse()
    new["epoch"], new["global_step"] = 1, 3
    new["loops"] = torch.load(path, weights_only=True)["loops"]
    torch.save(new, tmp_path / "moved.ckpt")
    seen = Resumed()
    resume(tmp_path / "moved.ckpt", tmp_path / "again", [seen])
    assert all(torch.equal(seen.moments[key], moment) for key, moment in expected.items())


def other_optimizer(arguments):
    arguments["optimizer"] = "sgd"


def other_groups(arguments):
    arguments["layer_decay"] = 0.5


def no_optimizer(checkpoint):
    del checkpoint["optimizer_states"]


@pytest.mark.parametrize(
    ("change", "damage", "message"),
    [
        (other_optimizer, None, "state of another optimizer, this training uses SGD"),
        (other_groups, None, "does not agree with the parameter groups"),
        (lambda _: None, no_optimizer, "has no optimizer state"),
    ],
)
def test_what_cannot_be_restored_is_refused_with_one_line(change, damage, message, tmp_path):
    path = unpacked("csdformer.ckpt", tmp_path)
    if damage is not None:
        checkpoint = torch.load(path, weights_only=True)
        damage(checkpoint)
        torch.save(checkpoint, path)
    with pytest.raises(QsdError, match=message) as error:
        resume(path, tmp_path / "run", change=change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["trained", "spiking"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_packed_files_take_the_same_bytes_and_names_as_before(name, kind, tmp_path):
    written = unpacked(f"{name}_{kind}.safetensors", tmp_path)
    again = tmp_path / "again.safetensors"
    qsd.save_packed(qsd.load_packed(written), again, notes=read_notes(written))
    assert again.stat().st_size == written.stat().st_size
    assert load_file(again).keys() == load_file(written).keys()
