"""``qsd profile``, from the user's end and in Python."""

import json

import pytest
import timm
import torch

from qsd.commands import profile as profiler
from tests.helpers import sample

# Tables of the paper (8.26, 18.51) and of Spikingformer's code; the neuron in front of the head is ours.
PUBLISHED = [
    ("csdformer_8_384", 4.661, 0.236, 13.0e6 + 384 * 196),
    ("csdformer_8_512", 8.257, 0.315, 16.5e6 + 512 * 196),
    ("csdformer_8_768", 18.512, 0.472, 23.5e6 + 768 * 196),
]


@pytest.mark.parametrize(
    ("name", "giga_macs", "products", "neurons"),
    PUBLISHED[: sample(1, 3)],
)
def test_operations_and_neurons_are_the_paper_s(name, giga_macs, products, neurons, capsys):
    assert profiler.main([name, "--json"]) == 0
    (profile,) = json.loads(capsys.readouterr().out)
    assert profile["macs"] / 1e9 == pytest.approx(giga_macs, abs=0.001)
    assert profile["product_macs"] / 1e9 == pytest.approx(products, abs=0.001)
    assert profile["neurons"] == pytest.approx(neurons, rel=0.005)
    assert profile["direct_epoch_macs"] == 4 * profile["epoch_macs"]
    assert profile["epoch_macs"] == 3 * (profile["macs"] + profile["product_macs"]) * 1_281_167
    metrics = profile["neurobench"]
    assert metrics["synaptic_operations"]["Dense"] == 4 * (profile["macs"] + profile["product_macs"])
    assert metrics["footprint"] == profile["packed_bytes"]
    assert metrics["activation_sparsity"] is None


def test_neurobench_s_metrics_are_measured_on_request():
    sizes = {"embed_dims": 8, "depth": 1, "num_heads": 2, "num_classes": 1}
    metrics = profiler.profile("csdformer_4_256", 16, sizes, epoch_images=10, spikes=True).neurobench
    assert 0 < metrics["activation_sparsity"] < 1
    operations = metrics["synaptic_operations"]
    assert 0 < operations["Effective_ACs"] < operations["Dense"]
    assert operations["Effective_MACs"] == 9 * 3 * 256


def test_a_profile_that_can_be_counted_by_hand():
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


def test_kept_bytes_are_those_of_a_real_forward_pass():
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


def test_any_registered_model_is_profiled_in_a_table(capsys):
    assert profiler.main(["qsd_tiny", "qsd_tiny_ann", "resnet10t", "--img-size", "64"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("qsd_tiny", "qsd_tiny_ann", "resnet10t"))
    # fused attention is counted too: 2 N^2 C in each of 12 blocks, 197 tokens
    assert profiler.profile("vit_tiny_patch16_224").product_macs == 12 * 2 * 197 * 197 * 192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["csdformer_8_38"], "unknown to timm; nearest names: csdformer_8_384"),
        (["csdformer_8_384", "--img-size", "8"], "8x8 pixels are smaller"),
        (["qsd_tiny", "--model-args", '{"width": 3}'], "model qsd_tiny does not take model_args={'width': 3}"),
    ],
)
def test_profiles_of_what_there_is_not_give_one_line(arguments, message, capsys):
    assert profiler.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
