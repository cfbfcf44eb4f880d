"""Weights by timm's own roads: a file, a folder, a state dict, another number of channels or classes."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from qsd import QsdError, save_packed
from qsd.layers import QuantConv2d
from tests.helpers.networks import SMALL

ARGUMENTS = {key: value for key, value in SMALL.items() if key != "num_classes"}


def build(**arguments):
    return timm.create_model("qsd_tiny", **{**ARGUMENTS, "num_classes": 5, **arguments})


@pytest.fixture(scope="module")
def source():
    model = build()
    for layer in model.modules():
        if isinstance(layer, QuantConv2d):
            layer.quantizer.step.data.mul_(1.25)  # trained, so that a measured step shows
    return model


@pytest.fixture(scope="module")
def files(source, tmp_path_factory):
    """The same weights in files of every kind."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(source.state_dict(), folder / "bare.pth")
    torch.save({"state_dict": {f"model.{n}": t for n, t in source.state_dict().items()}}, folder / "training.ckpt")
    save_file(source.state_dict(), folder / "plain.safetensors")
    save_packed(source, folder / "packed.safetensors")
    return folder


def same(model, source, but=()):
    expected = source.state_dict()
    return [n for n, t in model.state_dict().items() if n not in but and not torch.equal(t, expected[n])] == []


@pytest.mark.parametrize("name", ["bare.pth", "training.ckpt", "plain.safetensors"])
def test_files_are_loaded_by_overlay_and_by_checkpoint_path(files, source, name):
    assert same(build(pretrained=True, pretrained_cfg_overlay={"file": str(files / name)}), source)
    assert same(build(checkpoint_path=str(files / name)), source)


def test_packed_files_are_loaded_by_overlay_and_named_by_checkpoint_path(files, source):
    image = torch.randn(1, 3, 32, 32)
    path = str(files / "packed.safetensors")
    loaded = build(pretrained=True, pretrained_cfg_overlay={"file": path})
    assert torch.equal(loaded.eval()(image), source.eval()(image))
    with pytest.raises(QsdError, match=r"packed file; .*pretrained_cfg_overlay"):
        build(checkpoint_path=path)


def _folder(path, tensors, name, **cfg):
    path.mkdir()
    save_file(tensors, path / name)
    config = {"architecture": "qsd_tiny", "num_classes": 5, "model_args": {**ARGUMENTS, "embed_dims": [8, 8, 16, 24]}}
    (path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": cfg}))
    return f"local-dir:{path}"


@pytest.mark.parametrize("name", ["model.safetensors", "epoch3.safetensors"])
def test_a_local_folder_is_loaded(source, tmp_path, name):
    model = timm.create_model(_folder(tmp_path / "a", source.state_dict(), name, num_classes=5), pretrained=True)
    assert same(model, source)
    assert not same(timm.create_model(f"local-dir:{tmp_path / 'a'}"), source)
    save_file({"x": torch.zeros(1)}, tmp_path / "a" / "other.safetensors")
    if name != "model.safetensors":
        with pytest.raises(QsdError, match="needs one file of weights"):
            timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True)


def test_a_state_dict_is_loaded(source):
    assert same(build(pretrained=True, pretrained_cfg_overlay={"state_dict": source.state_dict()}), source)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_another_number_of_channels_is_adapted_and_its_steps_measured(files, source, channels):
    model = build(in_chans=channels, pretrained=True, pretrained_cfg_overlay={"file": str(files / "bare.pth")})
    first, old = model.stem.downsample.proj.conv, source.stem.downsample.proj.conv.weight
    expected = old.sum(1, keepdim=True) if channels == 1 else old[:, [i % 3 for i in range(channels)]] * 3 / channels
    torch.testing.assert_close(first.weight, expected)
    torch.testing.assert_close(first.quantizer.step[0], 2 * expected.abs().mean() / 7**0.5)
    assert same(model, source, but=("stem.downsample.proj.conv.weight", "stem.downsample.proj.conv.quantizer.step"))


@pytest.mark.parametrize("classes", [0, 3])
def test_another_number_of_classes_keeps_a_fresh_classifier(files, source, classes):
    model = build(num_classes=classes, pretrained=True, pretrained_cfg_overlay={"file": str(files / "training.ckpt")})
    assert same(model, source, but=("head.weight", "head.bias", "head.quantizer.step"))
    assert classes == 0 or len(model.head.weight) == classes


def test_features_alone_take_the_weights_of_their_part(files, source):
    overlay = {"file": str(files / "bare.pth")}
    model = build(pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, out_indices=(0, 1))
    assert same(model.model, source)


def test_a_float_network_gives_a_quantized_one_its_weights_and_steps_are_measured(tmp_path):
    twin = timm.create_model("qsd_tiny_ann", **ARGUMENTS, num_classes=5)
    torch.save(twin.state_dict(), tmp_path / "twin.pth")
    for model in (
        build(checkpoint_path=str(tmp_path / "twin.pth")),
        build(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "twin.pth")}),
    ):
        head = model.head
        assert torch.equal(head.weight, twin.head.weight)
        torch.testing.assert_close(head.quantizer.step[0], 2 * head.weight.abs().mean() / 7**0.5)


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({}, "no pretrained weights are distributed"),
        ({"file": "missing.pth"}, "missing.pth does not exist"),
        ({"url": "http://example.org/a.pth"}, "is no https address"),
        ({"hf_hub_id": "somebody/model"}, "hf-hub:somebody/model/.* cannot be fetched"),
    ],
)
def test_weights_that_cannot_be_had_are_named(overlay, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(QsdError, match=message):
        build(pretrained=True, pretrained_cfg_overlay=overlay)


def test_networks_of_other_channels_are_packed_by_their_name(files, tmp_path):
    from qsd import load_packed

    cfg = {"file": str(files / "bare.pth"), "input_size": (1, 32, 32)}
    model = build(pretrained=True, pretrained_cfg_overlay=cfg).eval()
    save_packed(model, tmp_path / "a.safetensors")
    image = torch.randn(1, model.in_chans, 32, 32)
    assert torch.equal(load_packed(tmp_path / "a.safetensors")(image), model(image))
