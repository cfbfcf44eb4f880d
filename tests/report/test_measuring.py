"""The record, against numbers that are computed otherwise; and the three files, whole or not at all."""

import json

import pytest
import timm
import torch
from torch import nn

import qsd
from qsd import QsdError, report
from qsd.data import DigitsData
from tests.helpers.networks import randomize_norms

SMALL = {"embed_dims": (8, 8, 8, 8), "num_heads": 2, "depth": 4, "strides": (1, 2, 2, 2, 1), "layer_scale": 0.5}
IMAGES = 12
FEW = {"max_images": IMAGES, "step_images": 6}


def options(**others):
    return report.ConversionOptions(**{**FEW, **others})


def write(trained, data, folder, **others):
    return report.write_conversion(trained, data.whole_part("val"), folder, options(**others), progress=False)


@pytest.fixture(scope="module")
def trained():
    """A network with the statistics of no training, but with spikes everywhere."""
    torch.manual_seed(0)
    model = timm.create_model("qsd_tiny", num_classes=10, in_chans=1, time_steps=3, **SMALL).eval()
    return randomize_norms(model, mean=(0, 0.3), var=(0.1, 0.4), weight=None, bias=None)


@pytest.fixture(scope="module")
def data():
    return DigitsData(img_size=16, batch_size=5)


@pytest.fixture(scope="module")
def recorded(trained, data):
    origin = report.Origin(source="validation images")
    return report.record_conversion(trained, data.whole_part("val"), options(), origin, progress=False)


@pytest.fixture(scope="module")
def batch(data):
    loader = data.whole_part("val")
    images, labels = (torch.cat(parts) for parts in zip(*loader))
    return images[:IMAGES], labels[:IMAGES]


def test_accuracy_and_agreement_are_those_of_the_two_networks(recorded, trained, batch):
    spiking, record = recorded
    images, labels = batch
    with torch.no_grad():
        expected, classes = trained(images).argmax(1), spiking(images).argmax(1)
    accuracy = record.accuracy
    assert accuracy.images == IMAGES
    assert accuracy.quantized == pytest.approx((expected == labels).double().mean())
    assert accuracy.spiking == pytest.approx((classes == labels).double().mean())
    assert accuracy.class_agreement == pytest.approx((classes == expected).double().mean())
    assert record.data.model_dump() == {"description": "12 validation images", "image_size": [1, 16, 16]}


def test_in_float64_nothing_differs_either_way(recorded):
    ways = {(c.dtype, c.way): c for c in recorded[1].comparison}
    assert set(ways) == {("float64", "count"), ("float64", "simulate"), ("float32", "count")}
    for (dtype, way), comparison in ways.items():
        assert comparison.images == (6 if way == "simulate" else IMAGES)
        if dtype == "float64":
            assert comparison.changed_images == 0
            assert comparison.class_agreement == 1


def test_rates_and_histograms_are_those_of_the_trained_counts(recorded, trained, batch):
    counts = qsd.count_spikes(trained, batch[0])
    neurons = {neuron.name: neuron for neuron in recorded[1].neurons}
    assert list(neurons) == list(counts)  # in the order of execution
    for name, count in counts.items():
        assert neurons[name].size == count[0].numel()
        assert neurons[name].rate == pytest.approx(float(count.double().mean()) / 3)
        shares = [float((count == n).double().mean()) for n in range(4)]
        assert neurons[name].histogram == pytest.approx(shares)


def test_delays_are_stepped_and_the_last_loses_nothing(recorded, trained, batch):
    spiking, record = recorded
    images, labels = batch[0][:6], batch[1][:6]
    rows = record.delays.rows
    assert [row.delay for row in rows] == [0, 1, 2]
    for row in rows:
        classes = spiking.simulate(images, delay=row.delay).logits.argmax(1)
        assert row.accuracy == pytest.approx((classes == labels).double().mean())
    assert rows[-1].class_agreement == 1
    assert rows[-1].accuracy == record.delays.quantized_accuracy
    assert rows[-1].latency == record.latency.steps == spiking.latency()
    assert [row.latency for row in rows] == sorted({row.latency for row in rows})


def test_the_raster_is_the_last_query_s_spikes(recorded, batch):
    spiking, record = recorded
    name = record.raster.name
    assert name == "stages.3.blocks.0.attn.q_neuron"
    spikes = spiking.simulate(batch[0][:5], record=name).spikes[name]
    drawn = torch.tensor(record.raster.spikes)
    assert drawn.shape == (5, 3, min(48, spikes[0, 0].numel()))  # of the first batch
    assert drawn[2, 1, -1] == spikes[1, 2].flatten()[-1]
    assert drawn.sum() > 0


def test_audit_energy_and_sizes_are_those_of_their_functions(recorded, data):
    spiking, record = recorded
    loader = data.whole_part("val")
    energy = qsd.measure_energy(spiking, loader, max_images=IMAGES, progress=False).to_dict()
    assert record.energy.model_dump() == energy
    assert record.audit.model_dump() == qsd.audit_spike_driven(spiking, loader, max_images=6).to_dict()
    assert record.sizes.packed_bytes == qsd.model_size(spiking).packed_bytes


def test_operations_and_bits_are_written_as_csv(recorded, tmp_path):
    report.write_csv(recorded[1], tmp_path / "layers.csv")
    lines = (tmp_path / "layers.csv").read_text().splitlines()
    assert len(lines) == 1 + 8 * len(recorded[1].energy.layers)
    assert lines[0].startswith("layer,kind,network,dataflow,rate,additions,macs,weights_read_bits,")


def test_metrics_are_numbers_by_name(recorded):
    metrics = report.metrics(recorded[1])
    assert all(name.startswith("spiking/") and isinstance(value, float) for name, value in metrics.items())
    assert metrics["spiking/changed_images_float64_count"] == 0
    assert {"spiking/accuracy", "spiking/accuracy_delay_0", "spiking/energy_merged_mj"} <= metrics.keys()


@pytest.mark.usefixtures("undrawn")
def test_short_delays_and_quantized_kernels_are_told_from_lossless_ones(trained, data):
    loader, stages = data.whole_part("val"), ["compare", "activity"]
    _, record = report.record_conversion(trained, loader, options(delay=0, stages=stages), progress=False)
    assert record.accuracy.way == "simulate"
    assert record.comparison[0].changed_images == 0  # compared at T - 1
    assert record.left_out == ["delays", "audit", "energy"]
    assert "a delay of 0 at every neuron" in report.html(record)
    _, record = report.record_conversion(trained, loader, options(merged_bits=2, stages=stages), progress=False)
    assert record.comparison[0].changed_images > 0
    (lossless, *_) = report.findings(record)
    assert lossless.title == "Not lossless."
    assert "quantized to 2 bits" in lossless.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stages": ["energie"]}, "stage 'energie' is unknown"),
        ({"max_images": 0}, "max_images=0 is not positive"),
        ({"float_accuracy": 98.0}, "float_accuracy=98.0 is no share"),
        ({"raster": "nobody"}, "raster='nobody' is no neuron"),
        ({"merged_bits": 1}, "merged_bits=1 is not from 2 to 16"),
        ({"preset": "fp8"}, "preset='fp8' is unknown"),
    ],
)
def test_mistakes_are_named(trained, data, wrong, message):
    with pytest.raises(QsdError, match=message):
        report.record_conversion(trained, data.whole_part("val"), options(**wrong), progress=False)


def test_images_without_labels_are_named(trained, batch):
    with pytest.raises(QsdError, match="no labels"):
        report.record_conversion(trained, [batch[0]], options(), progress=False)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_the_files_hold_the_record_the_page_and_the_same_network(trained, data, batch, tmp_path):
    folder = tmp_path / "new" / "folder"
    notes, chosen = {"class_names": data.class_names}, options(stages=["activity"])
    record = report.write_conversion(trained, data.whole_part("val"), folder, chosen, notes=notes, progress=False)
    assert {file.name for file in folder.iterdir()} == set(report.FILES)
    assert report.Record.read(folder / "conversion.json") == record
    assert json.loads((folder / "conversion.json").read_text()) == record.to_dict()
    assert (folder / "report.html").read_text() == report.html(record)
    assert record.sizes.file_bytes == (folder / "spiking.safetensors").stat().st_size
    loaded = qsd.load_packed(folder / "spiking.safetensors")
    assert torch.equal(loaded(batch[0]), qsd.to_spike_driven(trained)(batch[0]))


class OwnNetwork(nn.Module):
    """Of our layers, but unknown to timm."""

    def __init__(self):
        super().__init__()
        self.conv = qsd.layers.QuantConv2d(1, 4, 3, padding=1, weight_bits=4)
        self.neuron = qsd.neurons.SpikeNeuron(2)
        self.head = qsd.layers.QuantLinear(4 * 16 * 16, 10, weight_bits=4)

    def forward(self, x):
        return self.head(self.neuron(self.conv(x)).flatten(1))


def test_a_network_of_one_s_own_is_converted_and_written(data, tmp_path):
    record = write(OwnNetwork(), data, tmp_path)
    assert record.raster.name == "neuron"
    assert record.audit.spike_driven


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("step", ["files.html", "classifier.load_packed", "classifier.save_packed"])
def test_what_fails_leaves_nothing_and_keeps_what_was_there(trained, data, tmp_path, monkeypatch, step):
    def fail(*_):
        raise QsdError("no")

    for name in report.FILES:
        (tmp_path / name).write_text("earlier")
    monkeypatch.setattr(f"qsd.report.{step}", fail)
    with pytest.raises(QsdError, match="no"):
        write(trained, data, tmp_path, stages=[])
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(report.FILES, "earlier")


@pytest.mark.usefixtures("undrawn")
def test_a_packed_network_that_differs_is_not_written(trained, data, tmp_path, monkeypatch):
    other = qsd.to_spike_driven(timm.create_model("qsd_tiny", num_classes=10, in_chans=1, time_steps=3, **SMALL).eval())
    monkeypatch.setattr("qsd.report.classifier.load_packed", lambda *_: other)
    with pytest.raises(QsdError, match="gives other logits"):
        write(trained, data, tmp_path, stages=[])
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("undrawn")
def test_a_folder_that_cannot_be_written_is_named(trained, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QsdError, match="cannot be written to"):
        write(trained, data, tmp_path / "file", stages=[])
