"""What only a CUDA device can show; skipped elsewhere."""

import contextlib
import copy
import csv
import json
import subprocess
import sys
import warnings

import pytest
import timm
import torch

from qsd import cli, compare_counts, count_spikes, set_lean, to_spike_driven
from qsd.commands.benchmark import main as benchmark
from tests.helpers import ROOT
from tests.helpers.processes import run_in_two

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
SIZES = {
    "qsd_tiny": {"embed_dims": (16, 32, 32, 32), "num_heads": 4, "depth": 4, "layer_scale": 0.5, "num_classes": 5},
    "csdformer_4_256": {"embed_dims": 64, "num_heads": 4, "depth": 2, "num_classes": 5},
}


def network(name, images):
    """With statistics of its own inputs, so that its neurons fire."""
    model = timm.create_model(name, **SIZES[name]).to(images)
    for _ in range(30):
        model(images)
    return model.eval()


@pytest.mark.parametrize("name", SIZES)
def test_conversion_loses_nothing_in_float64_and_float32_is_not_tf32(name):
    images = torch.randn(16, 3, 64, 64, device="cuda", dtype=torch.float64)
    model = network(name, images)
    spiking = to_spike_driven(model)
    for way in ("count", "simulate"):
        assert compare_counts(model, spiking, images, way).equal_counts
    assert torch.backends.cudnn.allow_tf32, "PyTorch's default, with which a first difference lies some 1e-3 away"
    rounded = compare_counts(model.float(), spiking.float(), images.float())
    assert (rounded.farthest_first_difference or 0) < 1e-4


@pytest.mark.parametrize("name", SIZES)
def test_lean_training_has_the_gradients_of_ordinary_training(name):
    images = torch.randn(4, 3, 64, 64, device="cuda", dtype=torch.float64)
    trained, gradients = network(name, images).train(), []
    for lean in (False, True):
        model = copy.deepcopy(trained)  # each pass moves the running statistics, and frames are made of those
        set_lean(model, lean)
        model(images).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        difference = (gradient - gradients[1][name]).abs().max()
        assert difference <= 1e-9 * gradient.abs().max().clamp(min=1), name


@pytest.mark.parametrize("name", SIZES)
def test_memory_lean_training_is_off_by_default_and_keeps_less_where_it_is_on(name):
    images, kept = torch.randn(4, 3, 64, 64, device="cuda"), {}
    trained = network(name, images).train()
    for setting in ("auto", False, True):
        model, sizes = copy.deepcopy(trained), {}
        set_lean(model, setting)

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor.detach())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images)
        kept[setting] = sum(size for size, _ in sizes.values())
    assert kept["auto"] == kept[False]
    assert kept[True] < 0.7 * kept[False]


@pytest.mark.parametrize("allowed", [True, False])
def test_inference_warns_once_where_tf32_could_change_counts(allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    images = torch.randn(2, 3, 64, 64, device="cuda")
    spiking = to_spike_driven(network("qsd_tiny", images))
    expects = allowed and torch.cuda.get_device_capability()[0] >= 8
    warns = pytest.warns(UserWarning, match="TF32 .* Set torch.backends.cudnn.allow_tf32 = False")
    with warns if expects else contextlib.nullcontext():
        spiking(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spiking(images)
        count_spikes(spiking, images)


@pytest.mark.parametrize("code", ["unary", "binary"])
@pytest.mark.parametrize("name", SIZES)
def test_cuda_graphs_have_the_bits_of_ordinary_runs(name, code, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images, others = torch.randn(2, 4, 3, 64, 64, device="cuda").unbind()
    spiking = to_spike_driven(network(name, images), code=code)
    expected = [(spiking(batch), spiking.simulate(batch)) for batch in (images, others)]
    with spiking.graphs.recording():
        spiking(images)
        spiking.simulate(images)
    assert len(spiking.graphs._recorded) == 2
    found = [(spiking(batch), spiking.simulate(batch)) for batch in (images, others)]  # no result overwrites another
    for (logits, trace), (again, replayed) in zip(expected, found, strict=True):
        assert torch.equal(logits, again)
        assert torch.equal(trace.logits, replayed.logits)
        assert trace.counts.keys() == replayed.counts.keys()
        assert all(torch.equal(counts, replayed.counts[key]) for key, counts in trace.counts.items())


@pytest.mark.parametrize("name", SIZES)
def test_stepping_in_a_graph_has_the_counts_of_the_count_domain(name):
    images = torch.randn(4, 3, 64, 64, device="cuda", dtype=torch.float64)
    spiking = to_spike_driven(network(name, images))
    expected = count_spikes(spiking, images)
    with spiking.graphs.recording():
        spiking.simulate(images)
    found = spiking.simulate(images).counts
    assert found.keys() == expected.keys()
    assert all(torch.equal(counts.double(), expected[key]) for key, counts in found.items())


@pytest.mark.parametrize("name", SIZES)
def test_compiled_passes_of_the_count_domain_have_the_results_of_ordinary_ones(name):
    images = torch.randn(4, 3, 64, 64, device="cuda", dtype=torch.float64)
    spiking = to_spike_driven(network(name, images))
    expected = spiking(images)
    with spiking.graphs.recording(compile=True):
        spiking(images)
    torch.testing.assert_close(spiking(images), expected, rtol=1e-9, atol=1e-9)


def test_the_benchmark_measures_precisions_memory_and_the_largest_batch(tmp_path, capsys):
    small = ["--quick", "--rounds=1", "--img-size=32", "--batch-size=2", "--model=qsd_tiny", "--out", str(tmp_path)]
    assert benchmark(["inference", "training", "--device=cuda", *small, "--profile", "quantized, eager, bf16"]) == 0
    results = json.loads((tmp_path / "benchmark.json").read_text())
    for precision in ("", ", tf32", ", bf16", ", fp16"):
        row = results["training"][f"quantized, eager{precision}"]
        assert row["allocator_peak"] > row["kept_bytes"] > 0
        assert results["training"][f"lean, eager{precision}"]["kept_bytes"] < row["kept_bytes"]
    assert "count domain, graph" in results["inference"]
    assert "Self CUDA" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_half_precision_trains_converts_and_resumes(precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ["--config", str(ROOT / "configs/digits.yaml"), f"--trainer.precision={precision}"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    assert cli.main(["fit", *config, *quiet, "--trainer.max_epochs=3"]) == 0
    run = tmp_path / "runs/digits/version_0"
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert ("MixedPrecision" in checkpoint) == (precision == "16-mixed")  # the state of the gradients' scaler
    record = json.loads((run / "conversion.json").read_text())
    assert record["comparison"][0]["changed_images"] == 0
    last = ["--ckpt_path", str(run / "checkpoints/last.ckpt"), "--trainer.max_epochs=4"]
    assert cli.main(["fit", *config, *quiet, *last]) == 0
    (loss,) = validation_losses(tmp_path / "runs/digits/version_1")
    before = validation_losses(run)
    assert loss < before[-1] < before[0]  # it went on


def validation_losses(run):
    with (run / "metrics.csv").open() as file:
        return [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]


def test_synchronised_norms_train_in_a_process_group(tmp_path):
    command = ["-m", "qsd", "fit", "--config", ROOT / "configs/digits.yaml", "--trainer.max_epochs=1"]
    command += ["--trainer.strategy=ddp", "--trainer.devices=1", "--trainer.sync_batchnorm=true"]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "distributed_backend=nccl" in done.stderr + done.stdout
    run = tmp_path / "runs/digits/version_0"
    assert json.loads((run / "conversion.json").read_text())["comparison"][0]["changed_images"] == 0


def test_two_processes_on_one_device_have_the_gradients_of_one():
    run_in_two("synchronised_norms.py", "cuda", timeout=240)
