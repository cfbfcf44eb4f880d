"""The recipes for event cameras: each trains, converts and reports on tiny recordings of the real formats."""

import json

import numpy as np
import pytest
import timm
import torch

import qsd_launcher
from qsd import load_packed
from qsd.data.events import DigitEvents, RecordingArrays
from qsd.report import Record
from tests.helpers import CONFIGS, recordings, sample

SIZES = {"embed_dims": [8, 8, 8, 8], "num_heads": 2, "depth": 2, "strides": [2, 2, 1, 2, 1]}
FRAMES = {"frames": 2, "over_frames": "membrane"}
SHORT = [
    "--model.model_args=" + json.dumps({**SIZES, **FRAMES}), "--data.num_workers=0", "--data.batch_size=4", "--data.frames=2",
    "--data.img_size=16", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    "--trainer.precision=32",
]  # fmt: skip
WRITERS = {
    "cifar10_dvs": recordings.write_cifar10_dvs,
    "dvs128_gesture": recordings.write_gestures,
    "n_mnist": recordings.write_n_mnist,
}


@pytest.fixture
def few_digits(monkeypatch):
    load_all = DigitEvents.load_part

    def load_part(self, part):
        source = load_all(self, part)
        return RecordingArrays(source.events[:8], source.labels[:8], ["digit"] * 8, self.binning())

    monkeypatch.setattr(DigitEvents, "load_part", load_part)


@pytest.mark.parametrize("name", ["digit_events", *sample(["cifar10_dvs"], list(WRITERS))])
def test_a_recipe_trains_converts_and_reports(name, tmp_path, monkeypatch, capsys, few_digits):
    monkeypatch.chdir(tmp_path)
    options = [*SHORT]
    recording = str(tmp_path / "recording.npy")
    recordings.write_npy(recording, recordings.random_events(300, 16, 16))
    if name in WRITERS:
        root = WRITERS[name](tmp_path / name)
        recording = str(next(path for path in sorted(root.rglob("*.*")) if path.is_file()))
        options += [f"--data.root={root}", "--data.cache=cache"]
    if name == "cifar10_dvs":  # by the overlay, from weights of images
        torch.save(timm.create_model("qsd_15m", num_classes=5, **SIZES).state_dict(), "CHECKPOINT")
        options += ["--model.init_from=CHECKPOINT"]
        options = ["--config", str(CONFIGS / "cifar10_dvs_transfer.yaml"), *options]
    assert qsd_launcher.main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), *options]) == 0
    folder = tmp_path / "runs" / name / "version_0"
    record = Record.read(folder / "conversion.json")
    assert record.data.image_size == [2, 2, 16, 16]
    assert [c.changed_images for c in record.comparison if c.dtype == "float64"] == [0, 0]
    assert not any(o.stem or o.status == "analog" for o in record.audit.operations), "events are spikes already"
    assert [len(frame.brighter) for frame in record.activity.frames] == [16, 16]
    assert "Events, frames and spikes" in (folder / "report.html").read_text()
    spiking = load_packed(folder / "spiking.safetensors")
    assert {neuron.memory.frames for neuron in spiking.neurons().values()} == {2}
    capsys.readouterr()
    assert qsd_launcher.main(["run", recording, "--model", str(folder / "spiking.safetensors")]) == 0
    assert "Predictions" in capsys.readouterr().out


def test_a_file_of_one_frame_gives_the_network_output_by_its_state(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from qsd import QsdError, to_spike_driven
    from qsd.commands.predictor import run_session
    from qsd.export import to_onnx
    from qsd.spiking import run_frame
    from tests.spiking.test_frames import over_frames
    from tests.spiking.test_frames import recordings as random_recordings

    x = random_recordings(2)
    spiking = to_spike_driven(over_frames("qsd_tiny", "membrane").float())
    expected, state, total = spiking(x.float()), None, 0
    for frame in x.float().unbind(1):
        logits, state = run_frame(spiking, frame, state)
        total = total + logits / 3
    torch.testing.assert_close(total, expected)
    to_onnx(spiking, tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    found = run_session(session, x.float().numpy())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3)
    with pytest.raises(QsdError, match="keeps its membrane from frame to frame"):
        to_onnx(spiking, tmp_path / "b.onnx", integer=True, images=x.float())
    average = to_spike_driven(over_frames("qsd_tiny", "average").float())
    to_onnx(average, tmp_path / "b.onnx", integer=True, images=x.float())
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx", providers=["CPUExecutionProvider"])
    assert run_session(session, x.float().numpy()).shape == (2, 5)
