"""Reading weights: the published code's numbers, wrappers, mismatches."""

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open

from qsd import QsdError, load_reference_weights, load_weights
from qsd.models.reference import convert_reference, reference_sizes
from tests.helpers import DATA

FIXTURE = DATA / "qsd_reference_tiny.safetensors"


@pytest.fixture(scope="module")
def reference():
    """Tensors computed with the published code, by prefix."""
    with safe_open(FIXTURE, "pt") as file:
        config = json.loads(file.metadata()["config"])
        groups = {p: {} for p in ("state.", "train.grad.", "")}
        for name in file.keys():  # noqa: SIM118 - not a dict
            prefix = next(p for p in groups if name.startswith(p))
            groups[prefix][name.removeprefix(prefix)] = file.get_tensor(name)
    return config, groups["state."], groups["train.grad."], groups[""]


@pytest.fixture
def model(reference):
    config = reference[0]
    return timm.create_model(
        "qsd_8m",
        embed_dims=config["embed_dims"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        num_classes=config["num_classes"],
    ).double()


def assert_near(ours, published):
    """To 1e-9, absolute or relative to the tensor's largest entry: gradients reach 4.5e3."""
    assert (ours - published).abs().max() <= 1e-9 * max(1.0, published.abs().max())


def test_logits_stages_and_every_gradient_are_the_published_code_s(model, reference):
    _, state, gradients, tensors = reference
    load_reference_weights(model, state)
    model.eval()
    with torch.no_grad():
        assert_near(model(tensors["input"]), tensors["eval.logits"])
        stages = model.forward_intermediates(tensors["input"], intermediates_only=True)
    for i, stage in enumerate(stages):
        assert_near(stage, tensors[f"eval.stage{i + 1}"])
    model.train()
    logits = model(tensors["input"])
    assert_near(logits.detach(), tensors["train.logits"])
    (logits * tensors["train.weight"]).sum().backward()
    published = convert_reference(gradients)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == published.keys()
    for name, gradient in ours.items():
        assert_near(gradient, published[name])


def test_the_sizes_of_a_reference_checkpoint_can_be_read_off(reference):
    config, state, *_ = reference
    sizes = reference_sizes(state)
    assert sizes == {"embed_dims": tuple(config["embed_dims"]), "depth": 4, "in_chans": 3, "num_classes": 10}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": s},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
    ],
    ids=["bare", "model", "state_dict", "model and module.", "module."],
)
def test_wrappers_and_files_are_taken_off(wrap, model, reference, tmp_path):
    _, state, _, tensors = reference
    torch.save(wrap(state), tmp_path / "reference.pth")
    load_reference_weights(model, tmp_path / "reference.pth")
    assert_near(model.eval()(tensors["input"]).detach(), tensors["eval.logits"])


def test_another_class_count_leaves_a_fresh_classifier_and_says_so(reference, model, caplog):
    _, state, _, tensors = reference
    model.reset_classifier(7)
    before = model.head.weight.clone()
    with caplog.at_level(logging.WARNING):
        load_reference_weights(model, state)
    assert "no classifier for 7 classes" in caplog.text
    assert torch.equal(model.head.weight, before)
    with torch.no_grad():
        assert_near(
            model.eval().forward_intermediates(tensors["input"], intermediates_only=True)[3], tensors["eval.stage4"]
        )


def test_a_mismatch_is_one_short_line_and_changes_nothing(reference, model):
    _, state, *_ = reference
    state = dict(state)
    state["extra.weight"] = torch.zeros(3)
    del state["block3.0.layer_scale1"]
    state["downsample2.encode_bn.weight"] = torch.zeros(99)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(QsdError) as error:
        load_reference_weights(model, state)
    message = str(error.value)
    assert "1 missing: stages.2.blocks.0.attn.proj.layer_scale.gamma" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 of another shape: stages.1.downsample.proj.norm.weight (99,) instead of (16,)" in message
    assert "\n" not in message
    assert len(message) < 500
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_checkpoint_of_another_size_is_refused_with_a_short_list(reference):
    with pytest.raises(QsdError, match=r"does not fit the model .* and \d+ more"):
        load_reference_weights(timm.create_model("qsd_tiny"), reference[1])


def test_steps_that_were_never_initialised_come_from_the_weights(reference, model):
    _, state, *_ = reference
    state = dict(state)
    state["head.init_state"] = torch.zeros(1)
    state["head.alpha"] = torch.full((10,), float("nan"))  # uninitialised memory in the published code
    load_reference_weights(model, state)
    expected = 2 * state["head.weight"].abs().mean() / 7**0.5
    torch.testing.assert_close(model.head.quantizer.step.detach(), expected.expand(10))


def test_steps_that_are_not_positive_are_named(reference, model):
    state = {**reference[1], "head.alpha": torch.full((10,), -1.0)}
    with pytest.raises(QsdError, match=r"not positive: head\.quantizer\.step"):
        load_reference_weights(model, state)


def test_a_float_twin_takes_the_weights_and_drops_the_steps(reference):
    config, state, *_ = reference
    twin = timm.create_model("qsd_tiny_ann", embed_dims=config["embed_dims"], num_heads=4, num_classes=10)
    load_reference_weights(twin, state)
    torch.testing.assert_close(twin.head.weight, state["head.weight"].float())
    quantized = timm.create_model("qsd_tiny", embed_dims=config["embed_dims"], num_heads=4, num_classes=10)
    load_weights(quantized, twin.state_dict())  # and back: steps from the weights
    torch.testing.assert_close(quantized.head.quantizer.step[0], 2 * quantized.head.weight.abs().mean() / 7**0.5)


def test_our_own_files_of_every_kind_load(model, tmp_path):
    state = model.state_dict()
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 1}, tmp_path / "w.ckpt")
    torch.save(state, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.ckpt", "w.pt"):
        other = timm.create_model("qsd_tiny", embed_dims=(8, 16, 24, 32), num_heads=4, num_classes=10).double()
        load_weights(other, tmp_path / name)
        assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"not a checkpoint", "cannot be read: it is damaged, incomplete or no checkpoint"),
        (b"", "cannot be read"),
        ({"epoch": 3}, "holds no state dict"),
        ({"conv.weight": torch.zeros(2)}, "no checkpoint of the published"),
    ],
    ids=["missing", "garbage", "empty", "no tensors", "other network"],
)
def test_files_that_cannot_serve_are_named(content, message, tmp_path, model):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(QsdError, match=message):
        load_reference_weights(model, path)


def test_what_training_scripts_put_beside_the_weights_does_no_harm(reference, model, tmp_path):
    beside = {"args": argparse.Namespace(lr=1e-3, folder="x"), "best": np.float64(0.5), "epoch": 3}
    torch.save({"model": reference[1], **beside}, tmp_path / "script.pth")
    load_reference_weights(model, tmp_path / "script.pth")


def test_weights_that_are_not_finite_are_refused(reference, model):
    state = {**reference[1], "head.weight": reference[1]["head.weight"] / 0}
    with pytest.raises(QsdError, match=r"not finite: head\.weight"):
        load_reference_weights(model, state)


def test_an_incomplete_reference_is_named(reference):
    state = {k: v for k, v in reference[1].items() if "downsample3" not in k}
    with pytest.raises(QsdError, match=r"incomplete: downsample3\.encode_conv\.weight missing"):
        reference_sizes(state)


def test_pickled_code_is_not_run(tmp_path, model):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(QsdError, match=r"is refused: this file wants to run code \(\S+"):
        load_reference_weights(model, tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
