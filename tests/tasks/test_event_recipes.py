"""The recipes for event cameras: each trains, converts and reports on tiny recordings of the real formats."""

import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

import qsd_launcher
from qsd import QsdError, load_packed, to_integer, to_spike_driven
from qsd.commands.predictor import run_session
from qsd.data.events import DigitEvents, RecordingArrays
from qsd.export import to_onnx
from qsd.layers import TokenMeanLinear, conv_norm
from qsd.layers.frames import EventCounts, FrameAxis, FrameMean, keep_membranes
from qsd.neurons import SpikeNeuron
from qsd.report import Record
from qsd.spiking import run_frame
from tests.helpers import CONFIGS, recordings, sample
from tests.helpers.conversions import shorten_conversions

SIZES = {"embed_dims": [8, 8, 8, 8], "num_heads": 2, "depth": 2, "strides": [2, 2, 1, 2, 1], "time_steps": 2}
FRAMES = {"frames": 2, "over_frames": "membrane"}
SHORT = [
    "--model.model_args=" + json.dumps({**SIZES, **FRAMES}), "--data.num_workers=0", "--data.batch_size=4",
    "--data.frames=2", "--data.img_size=16", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
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


@pytest.mark.parametrize("name", sample(["cifar10_dvs"], ["digit_events", *WRITERS]))
def test_a_recipe_trains_converts_and_reports(name, tmp_path, monkeypatch, capsys, few_digits):
    monkeypatch.chdir(tmp_path)
    shorten_conversions(monkeypatch, stages=("compare", "audit", "activity"))
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
    report = (folder / "report.html").read_text()
    assert "Events, frames and spikes" in report
    assert "operations but the first" not in report, "events are spikes already"
    spiking = load_packed(folder / "spiking.safetensors")
    assert {neuron.memory.frames for neuron in spiking.neurons().values()} == {2}
    capsys.readouterr()
    assert qsd_launcher.main(["run", recording, "--model", str(folder / "spiking.safetensors")]) == 0
    assert "Predictions" in capsys.readouterr().out


class TinyNetwork(nn.Module):
    """Two neurons over the frames of event counts."""

    def __init__(self, mode, frames=3):
        super().__init__()
        self.frame_axis, self.event_counts = FrameAxis(frames, mode), EventCounts(4)
        self.first, self.neuron = conv_norm(2, 4, 3), SpikeNeuron(4)
        self.second, self.last = conv_norm(4, 6, 3), SpikeNeuron(4)
        self.head, self.frame_mean = TokenMeanLinear(6, 5), FrameMean(frames)
        if mode == "membrane":
            keep_membranes(self, frames, 0.5)

    def forward(self, x):
        x = self.neuron(self.first(self.event_counts(self.frame_axis(x))))
        return self.frame_mean(self.head(self.last(self.second(x))))


def test_a_file_of_one_frame_gives_the_network_output_by_its_state(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    x = torch.poisson(torch.full((2, 3, 2, 8, 8), 1.5))
    spiking = to_spike_driven(TinyNetwork("membrane").eval(), example=x[:1])
    expected, state, total = spiking(x), None, 0
    for frame in x.unbind(1):
        logits, state = run_frame(spiking, frame, state)
        total = total + logits / 3
    torch.testing.assert_close(total, expected)
    with pytest.raises(QsdError, match="the state is that of 2 recordings, and the frame that of 1"):
        run_frame(spiking, x[:1, 0], state)
    to_onnx(spiking, tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(run_session(session, x.numpy()), expected.numpy(), rtol=1e-4, atol=1e-4)
    with pytest.raises(QsdError, match="keeps its membrane from frame to frame"):
        to_onnx(spiking, tmp_path / "b.onnx", integer=True, images=x)
    with pytest.raises(QsdError, match="takes the frames of recordings, and an integer network takes images"):
        to_integer(spiking, x)
    average = to_spike_driven(TinyNetwork("average").eval(), example=x[:1])
    to_onnx(average, tmp_path / "b.onnx", integer=True, images=x)
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(run_session(session, x.numpy()), average(x).numpy(), rtol=1e-3, atol=1e-3)
