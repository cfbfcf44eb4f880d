"""The benchmark measures what it says, and its baseline trains."""

import json
from functools import partial

import pytest
import timm
import torch
from torch import nn

from qsd.commands.benchmark import command, meter
from qsd.commands.benchmark.direct import DirectlyTrained, LeakyIntegrateAndFire
from qsd.commands.benchmark.largest import largest_batch
from qsd.functional import spike_count
from qsd.lean import switch
from tests.helpers import long


@pytest.fixture(autouse=True)
def tensors_of_all_sizes_train_lean(monkeypatch):
    monkeypatch.setattr(switch, "SMALLEST", 0)


@pytest.fixture
def benchmark(monkeypatch):
    """The command with networks of two blocks, whatever their name."""
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2))
    return command


def test_quick_inference_and_training_write_ratios_and_a_plot(benchmark, tmp_path, capsys):
    small = ["--quick", "--no-memory", "--img-size=32", "--batch-size=2", "--out", str(tmp_path)]
    assert benchmark.main(["inference", "training", *small]) == 0
    results = json.loads((tmp_path / "benchmark.json").read_text())
    for suite, case, versus, target in (
        ("inference", "count domain", "quantized", 1.0),
        ("inference", "stepping", "count domain", 4.5),
        ("inference", "stepping, merged kernels", "count domain, merged kernels", 4.5),
        ("training", "quantized, eager", "float twin, eager", 1.2),
        ("training", "plain, eager", "float twin, eager", None),
        ("training", "quantized, eager", "direct, eager", None),
        ("training", "distilled, eager", "quantized, eager", 1.45),
    ):
        ratio = results[suite][case]["ratios"][versus]
        assert (ratio["target"], len(ratio["rounds"])) == (target, 3)
        seconds = zip(results[suite][case]["rounds"], results[suite][versus]["rounds"])
        assert ratio["median"] == pytest.approx(sorted(a / b for a, b in seconds)[1])
    # four times the activations, beside the weights that both keep, which count for much at this size
    kept = {name: row["kept_bytes"] for name, row in results["training"].items() if "kept_bytes" in row}
    ratios = results["training"]["quantized, eager"]["kept_ratios"]
    assert set(ratios) == {"float twin, eager", "plain, eager"}
    for versus, ratio in ratios.items():
        assert ratio["ratio"] == kept["quantized, eager"] / kept[versus]
        assert ratio["ratio"] < ratio["target"]
    assert kept["direct, eager"] > 1.5 * kept["quantized, eager"]
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert "inference, qsd_tiny, 32 px, batch 2" in capsys.readouterr().out


def test_half_precision_is_measured_beside_the_twin_and_kernels_are_listed(benchmark, tmp_path, capsys):
    small = ["--quick", "--rounds=1", "--no-memory", "--img-size=32", "--batch-size=2", "--out", str(tmp_path)]
    options = ["--precisions", "bf16", "--profile", "quantized, eager, bf16"]
    assert benchmark.main(["training", *small, *options]) == 0
    results = json.loads((tmp_path / "benchmark.json").read_text())["training"]
    row = results["quantized, eager, bf16"]
    assert set(row["ratios"]) == {"float twin, eager, bf16", "direct, eager, bf16"}
    assert row["images_per_second"] == pytest.approx(2 / row["median"])
    assert row["kept_bytes"] < 0.7 * results["plain, eager, bf16"]["kept_bytes"]
    assert "aten::" in row["profile"]
    assert "kernels, quantized, eager, bf16" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "says"), [
    (["--device=cuda"], "the device 'cuda' does not exist here; there are 0 CUDA devices"),
    (["--precisions", "tf32"], "TF32 is measured on CUDA devices alone, and the device is cpu; leave it out."),
    (["--largest"], "the largest batch is measured on CUDA devices alone"),
    (["training", "--quick", "--profile", "twin"], "profile='twin' is no case of this benchmark; cases: float twin,"),
])  # fmt: skip
def test_impossible_measurements_are_refused_in_one_line(options, says, benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert benchmark.main(options) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1


def test_on_a_device_both_families_are_measured_in_all_precisions_at_batch_64(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings = benchmark.parse(["--device=cuda", "--out", str(tmp_path)])
    assert (settings.name, *settings.also) == ("qsd_15m", "csdformer_8_384")
    assert tuple(settings.suites) == ("inference", "training")
    assert tuple(settings.precisions) == ("float32", "tf32", "bf16", "fp16")
    assert settings.batch_size == 64


def test_the_largest_batch_is_found_to_a_sixteenth_in_few_tries():
    for most in (0, 1, 2, 3, 17, 63, 64, 65, 100, 1000, 4097):
        tried = []

        def fits(batch, most=most, tried=tried):
            tried.append(batch)
            return batch <= most

        found = largest_batch(fits, 64)
        assert found <= most
        assert most - found <= most // 16 + 1
        assert len(set(tried)) == len(tried) <= 14
    assert largest_batch(lambda batch: True, 64) == 2**16


@long
def test_quick_export_writes_ratios_and_the_sizes_of_its_files(benchmark, tmp_path):
    assert benchmark.main(["export", "--quick", "--img-size=32", "--batch-size=2", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "benchmark.json").read_text())["export"]
    ratios = results["integer file"]["ratios"]
    assert ratios["float twin"]["target"] == 1 / 3.5
    assert ratios["float twin, ONNX Runtime"]["target"] == 1 / 2
    files = {name: row["file_bytes"] for name, row in results.items() if "file_bytes" in row}
    assert files["integer file"] < 0.4 * files["float twin, ONNX Runtime"] < 0.5 * files["float file"]


def test_loading_tells_how_long_steps_wait_for_images(benchmark, tmp_path, capsys):
    small = ["--quick", "--img-size=32", "--batch-size=2", "--rounds=2", "--workers=1", "--out", str(tmp_path)]
    assert benchmark.main(["loading", *small]) == 0
    loading = json.loads((tmp_path / "benchmark.json").read_text())["loading"]
    assert loading["workers"] == 1
    assert len(loading["shares"]) == 2
    assert min(loading["shares"]) <= loading["share_waiting"] <= max(loading["shares"])
    assert 0 < loading["share_waiting"] < 1
    assert loading["images_per_second"] > 0
    assert loading["recordings"]["events_per_second"] > 1e4
    assert 0 < loading["recordings"]["share_waiting"] < 1
    assert {"folders", "shards"} <= set(loading["formats"])
    for row in loading["formats"].values():
        assert row["ratio"] > 0.3  # of a few images; the target is checked by hand
        assert row["images_per_second"] > 0
    assert "% of the time waiting, 1 workers" in capsys.readouterr().out


@long
def test_growth_has_exponents(benchmark, tmp_path):
    assert (
        benchmark.main(
            ["sizes", "--quick", "--rounds=1", "--img-size=32", "--sizes", "32", "48", "--out", str(tmp_path)]
        )
        == 0
    )
    table = json.loads((tmp_path / "benchmark.json").read_text())["sizes"]["pixels"]
    assert table["x"] == [32**2, 48**2]
    assert set(table["exponents"]) == {"count domain", "training step, quantized", "training step, float twin"}


@long
def test_peak_memory_is_that_of_the_case_alone(benchmark):
    options = benchmark.parse(["inference", "--quick"])
    ballast = torch.ones(100_000_000)  # of this process; must not count
    peaks = meter.peak_memory(options, "inference", "count domain")
    assert 1e8 < peaks["before"] <= peaks["peak"] < meter.resident_peak()
    assert ballast.sum() > 0


def test_kept_bytes_are_counted_by_storage_without_parameters_and_images():
    images = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid())
    assert meter.kept_bytes(model, images) == 2 * 4 * 64 * 4  # the sigmoid's output; weights and images are there

    class Neuron(nn.Module):
        def forward(self, x):
            return spike_count(x, 4)

    mask = 2 * 4 * 64  # one byte each
    assert meter.kept_bytes(nn.Sequential(nn.Conv2d(3, 4, 1), Neuron()), images) == mask


def test_the_directly_trained_baseline_fires_binary_spikes_over_time_and_has_gradients():
    sizes = {"embed_dims": (8, 8, 16, 16), "num_heads": 2, "depth": 4, "layer_scale": 1.0}
    model = DirectlyTrained("qsd_tiny", 3, num_classes=5, **sizes)
    spikes = []
    for module in model.modules():
        if isinstance(module, LeakyIntegrateAndFire):
            module.register_forward_hook(lambda m, _, out: spikes.append((out, m.amplitude)))
    logits = model(torch.randn(2, 3, 32, 32))
    logits.square().sum().backward()
    assert logits.shape == (2, 5)
    assert all(out.shape[0] == 3 * 2 and set(out.unique().tolist()) <= {0.0, amplitude} for out, amplitude in spikes)
    assert any(bool(p.grad.any()) for p in model.network.stem.parameters())
    neuron = LeakyIntegrateAndFire(3, 1.0, 1.0)
    # by hand: 0.8 stays, 0.4 + 0.8 fires and leaves 0.2, 0.1 + 0.8 stays
    assert neuron(torch.full((3, 1), 0.8)).flatten().tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet18"], "model 'resnet18' is unknown or has no float twin"),
        (["--rounds", "0"], "argument --rounds: 0 is below 1"),
        (["--out", "missing"], "the folder missing does not exist"),
    ],
)
def test_mistakes_give_one_line(benchmark, capsys, arguments, message):
    assert benchmark.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_every_default_model_has_a_float_twin(benchmark):
    assert all(timm.is_model(f"{name}_ann") for name in benchmark.MODELS)
