"""The tools, from the user's end: importing checkpoints, profiles of models, comparing activations."""

import json
from pathlib import Path

import pytest
import timm
import torch

from qsd import cli
from tests.helpers import ROOT


@pytest.fixture
def importer(tool):
    return tool("import_checkpoint")


@pytest.fixture
def reference(tmp_path, reference_state, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {f"module.{k}": v for k, v in reference_state.items()}}, "reference.pth")
    return Path("reference.pth")


def test_an_imported_checkpoint_is_validated_tested_and_trained_on(importer, reference, write_tree, tmp_path):
    tree = write_tree(tmp_path / "ten", {p: {f"c{i}": 1 for i in range(10)} for p in ("train", "val")})
    assert importer.main(["reference.pth", "imported.ckpt", "--num-heads", "4"]) == 0
    quick = [
        "--data.root", str(tree), "--data.img_size=32", "--data.num_workers=0", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--ckpt_path=imported.ckpt",
    ]  # fmt: skip
    for command in ("validate", "test"):
        assert cli.main([command, "--data=ImageFolderData", *quick]) == 0
    config = ["--config", str(ROOT / "configs/imagenet.yaml"), "--trainer.max_epochs=1", "--model.base_lr=0.123"]
    assert cli.main(["fit", *config, *quick, "--trainer.precision=32"]) == 0
    trained = torch.load("runs/imagenet/version_0/checkpoints/last.ckpt", weights_only=True)
    assert trained["global_step"] == 1
    assert trained["hyper_parameters"]["base_lr"] == 0.123  # the configuration's, not the imported file's
    assert trained["hyper_parameters"]["model_args"]["embed_dims"] == [8, 16, 24, 32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pth", "out.ckpt"], "checkpoint missing.pth does not exist"),
        (["reference.pth", "there.ckpt"], "there.ckpt exists; pass --force"),
        (["other.pth", "out.ckpt"], "no checkpoint of the published"),
        (["reference.pth", "out.ckpt", "--num-heads=7"], "not divisible by num_heads=7"),
    ],
)
def test_mistakes_give_one_line_and_leave_nothing(importer, reference, capsys, arguments, message):
    Path("there.ckpt").write_text("precious")
    torch.save({"model": {"conv.weight": torch.zeros(3)}}, "other.pth")
    assert importer.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out.ckpt").exists()
    assert Path("there.ckpt").read_text() == "precious"


def test_configurations_are_valid_json_once_dumped(reference, importer):
    importer.main(["reference.pth", "imported.ckpt", "--num-heads", "4"])
    json.dumps(torch.load("imported.ckpt", weights_only=True)["hyper_parameters"])


# -- profiles ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def profiler(tool):
    return tool("profile_model")


@pytest.mark.parametrize(
    ("name", "giga_macs", "products", "neurons"),
    [
        # Tables of the paper (8.26, 18.51) and of Spikingformer's code; the neuron in front of the head is ours.
        ("csdformer_8_384", 4.661, 0.236, 13.0e6 + 384 * 196),
        ("csdformer_8_512", 8.257, 0.315, 16.5e6 + 512 * 196),
        ("csdformer_8_768", 18.512, 0.472, 23.5e6 + 768 * 196),
    ],
)
def test_operations_and_neurons_are_the_paper_s(name, giga_macs, products, neurons, profiler, capsys):
    assert profiler.main([name, "--json"]) == 0
    (profile,) = json.loads(capsys.readouterr().out)
    assert profile["macs"] / 1e9 == pytest.approx(giga_macs, abs=0.001)
    assert profile["product_macs"] / 1e9 == pytest.approx(products, abs=0.001)
    assert profile["neurons"] == pytest.approx(neurons, rel=0.005)
    assert profile["direct_epoch_macs"] == 4 * profile["epoch_macs"]
    assert profile["epoch_macs"] == 3 * (profile["macs"] + profile["product_macs"]) * 1_281_167


def test_a_profile_that_can_be_counted_by_hand(profiler):
    # 8 channels, 16 px, one block on 4 x 4 tokens of CIFAR's tokenizer (pools in its last two stages), one class
    sizes = {"embed_dims": 8, "depth": 1, "num_heads": 2, "num_classes": 1, "time_steps": 6}
    profile = profiler.profile("csdformer_4_256", 16, sizes, epoch_images=10)
    convolutions = 9 * (3 * 1 * 256 + 1 * 2 * 256 + 2 * 4 * 256 + 4 * 8 * 64 + 8 * 8 * 16)
    block = 16 * (4 * 64 + 8 * 64)
    assert profile.macs == convolutions + block + 8
    assert profile.product_macs == 2 * 16 * 16 * 8
    tokenizer = 1 * 256 + 2 * 256 + 4 * 256 + 8 * 64
    attention = 16 * 8 * 5 + 2 * 16 * 16
    assert profile.neurons == tokenizer + attention + 16 * (8 + 32) + 16 * 8
    assert (profile.time_steps, profile.epoch_images) == (6, 10)
    assert profile.direct_epoch_macs == 6 * profile.epoch_macs == 6 * 30 * (profile.macs + profile.product_macs)


def test_kept_bytes_are_those_of_a_real_forward_pass(profiler):
    sizes = {"embed_dims": 16, "depth": 1, "num_heads": 2}
    profile = profiler.profile("csdformer_4_256", 32, sizes)
    model = timm.create_model("csdformer_4_256", **sizes).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.randn(2, 3, 32, 32))
    assert output.requires_grad
    assert profile.kept_bytes == pytest.approx(sum(size for size, _ in kept.values()) / 2, rel=0.01)


def test_any_registered_model_is_profiled_in_a_table(profiler, capsys):
    assert profiler.main(["qsd_tiny", "qsd_tiny_ann", "resnet10t", "--image-size", "64"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("qsd_tiny", "qsd_tiny_ann", "resnet10t"))
    # fused attention is counted too: 2 N^2 C in each of 12 blocks, 197 tokens
    assert profiler.profile("vit_tiny_patch16_224").product_macs == 12 * 2 * 197 * 197 * 192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["csdformer_8_38"], "unknown to timm; nearest names: csdformer_8_384"),
        (["csdformer_8_384", "--image-size", "8"], "8x8 pixels are smaller"),
        (["qsd_tiny", "--model-args", '{"width": 3}'], "model qsd_tiny does not take model_args={'width': 3}"),
    ],
)
def test_profiles_of_what_there_is_not_give_one_line(arguments, message, profiler, capsys):
    assert profiler.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_comparison_needs_a_configuration(tool, capsys):
    assert tool("compare_activations").main(["--config", "nothing.yaml"]) == 2
    assert "configuration nothing.yaml does not exist" in capsys.readouterr().err
