"""Folders of integers are read without this package, and C programs give the simulator's spikes bit for bit."""

import json
import shutil
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import qsd
from qsd.export import read_integers, write_c, write_integers, write_qonnx
from qsd.layers import SpikeMaxPool2d, TokenMeanLinear, conv_norm
from qsd.neurons import SpikeNeuron
from tests.helpers import ROOT, sample
from tests.helpers.exporting import CSD, ESF, QSD, spiking_network

NETWORKS = {"csdformer": (CSD, {}), "qsd": (QSD, {}), "merged": (QSD, {"merged_bits": 8}), "e-spikeformer": (ESF, {})}
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
WARNINGS = ["-std=c99", "-Wall", "-Wextra", "-Werror"]


@cache
def integers(name):
    network, options = NETWORKS[name]
    spiking, images = spiking_network(*network, double=True, **options)
    made = qsd.to_integer(spiking, images[:4], fractional_bits=12)
    return made, made.pixels(images[:2])


def memory(path, shape):
    """The integers of a file for ``$readmemh``, whose first line tells the width."""
    head, *lines = path.read_text().splitlines()
    bits = int(head.split()[1])
    values = np.array([int(line, 16) for line in lines])
    assert (values < 2**bits).all()
    return np.where(values >= 2 ** (bits - 1), values - 2**bits, values).reshape(shape)


@pytest.mark.parametrize("name", sample(["csdformer", "qsd"], [*NETWORKS]))
def test_a_reader_of_a_hundred_lines_matches_the_test_vectors(name, tmp_path):
    network, pixels = integers(name)
    write_integers(network, tmp_path / "dump", pixels, {"class_names": ["a"]})
    reader = ROOT / "docs" / "read_integers.py"
    source = reader.read_text()
    assert len(source.splitlines()) <= 100
    assert "import qsd" not in source
    # Isolated: no folder of this package is on the path.
    done = subprocess.run([sys.executable, "-I", reader, tmp_path / "dump"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    classes = network(pixels).argmax(1)
    assert done.stdout.splitlines() == [f"image {i}: class {c}, all spikes as expected" for i, c in enumerate(classes)]
    dump = read_integers(tmp_path / "dump")
    assert dump.network == network.description
    assert dump.notes == {"class_names": ["a"]}
    assert dump.record.bounds == network.bounds
    for array, values in network.arrays.items():
        file = tmp_path / "dump" / "hex" / f"{array.replace('/', '.')}.hex"
        if file.exists():
            np.testing.assert_array_equal(memory(file, values.shape), values)
        else:
            layer = network.layer(array.rpartition("/")[0])
            table = memory(file.with_name(f"{layer.name}.table.hex"), (len(values), 2**layer.weight_bits))
            assert array.endswith("/multiplier")
            codes = np.arange(2**layer.weight_bits)
            weights = np.where(codes < len(codes) // 2, codes, codes - len(codes))
            wide = weights * values.astype(np.int64)[:, None] / 2**layer.table_shift
            np.testing.assert_array_equal(table, np.floor(wide + 0.5))


def test_a_folder_that_does_not_fit_its_schema_is_refused_in_one_line(tmp_path):
    network, _ = integers("csdformer")
    write_integers(network, tmp_path, memories=False)
    assert {path.name for path in tmp_path.iterdir()} == {"network.json", "schema.json", "arrays.npz"}
    content = json.loads((tmp_path / "network.json").read_text())
    for change, message in (
        ({"version": 2}, "has version 2 of the format; this qsd reads 1"),
        ({"time_steps": 0}, "does not fit at network.time_steps"),
    ):
        changed = {**content, "network": {**content["network"], **change}}
        (tmp_path / "network.json").write_text(json.dumps(changed))
        with pytest.raises(qsd.QsdError, match=message):
            read_integers(tmp_path)
    with pytest.raises(qsd.QsdError, match=r"nowhere.network\.json cannot be read"):
        read_integers(tmp_path / "nowhere")


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
@pytest.mark.parametrize("name", sample(["csdformer", "qsd"], [*NETWORKS]))
def test_the_c_program_gives_the_spikes_of_the_simulator(name, tmp_path):
    network, pixels = integers(name)
    write_c(network, tmp_path / "net.c")
    source = (tmp_path / "net.c").read_text()
    assert not [word for word in ("float", "double", "malloc", "calloc", "realloc", "free(") if word in source]
    program = tmp_path / "net"
    checks = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run([COMPILER, *WARNINGS, *checks, "-o", program, tmp_path / "net.c"], capture_output=True)
    if b"sanitize" in built.stderr:  # A compiler without these libraries.
        built = subprocess.run([COMPILER, *WARNINGS, "-O1", "-o", program, tmp_path / "net.c"], capture_output=True)
    assert built.returncode == 0, built.stderr.decode()
    (tmp_path / "images").write_bytes(pixels.tobytes())

    def run(mode):
        done = subprocess.run([program, mode, tmp_path / "images"], capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    output = network(pixels)
    expected = [" ".join(map(str, [row.argmax(), *row])) for row in output]
    assert run("count").decode().splitlines() == expected
    assert run("step").decode().splitlines() == expected
    signals = network.simulate(pixels).signals
    firing = [layer.name for layer in network.description.layers if layer.kind in ("neuron", "max_pool")]
    spikes = [signals[layer][:, i].astype(np.uint8).tobytes() for i in range(len(pixels)) for layer in firing]
    assert run("spikes") == b"".join(spikes)
    (tmp_path / "images").write_bytes(pixels.tobytes()[:-1])
    failed = subprocess.run([program, "count", tmp_path / "images"], capture_output=True, text=True)
    assert (failed.returncode, len(failed.stdout.splitlines())) == (2, len(pixels) - 1)
    assert "bytes after" in failed.stderr
    failed = subprocess.run([program, "wrong"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("usage: ")


def convolutional_network():
    """Without attention: a first layer that a neuron reads, a max-pool and a sum of two branches."""
    torch.manual_seed(0)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.neuron = conv_norm(1, 8, 3, 2), SpikeNeuron(4)
            self.left, self.right = conv_norm(8, 8, 3), conv_norm(8, 8, 1)
            self.after, self.pool = SpikeNeuron(4), SpikeMaxPool2d(2)
            self.head = TokenMeanLinear(8, 3)

        def forward(self, x):
            spikes = self.neuron(self.stem(x))
            return self.head(self.pool(self.after(self.left(spikes) + self.right(spikes))))

    network = Network()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)  # Some channels are turned around.
            nn.init.normal_(module.bias, 0, 0.3)
    return network.double().eval()


def test_qonnx_executes_a_convolutional_network_alike(tmp_path):
    execution = pytest.importorskip("qonnx.core.onnx_exec")
    wrapper = pytest.importorskip("qonnx.core.modelwrapper")
    images = torch.randn(2, 1, 12, 12, dtype=torch.float64)
    network = qsd.to_integer(qsd.to_spike_driven(convolutional_network()), images, fractional_bits=8)
    write_qonnx(network, tmp_path / "a.onnx")
    pixels = network.pixels(images)
    signals = network.count(pixels).signals
    model = wrapper.ModelWrapper(str(tmp_path / "a.onnx"))
    for i in range(len(pixels)):
        context = execution.execute_onnx(model, {"image": signals["image"][i : i + 1].astype(np.float32)}, True)
        for name in (*network.neurons(), network.description.output):
            np.testing.assert_array_equal(context[name], signals[name][i : i + 1])


def test_qonnx_says_why_it_cannot_express_a_network(tmp_path):
    network, _ = integers("csdformer")
    with pytest.raises(qsd.QsdError, match=r"layer blocks\.0\..* QONNX"):
        write_qonnx(network, tmp_path / "a.onnx")
    network, _ = integers("qsd")
    with pytest.raises(qsd.QsdError, match=r"layer .* QONNX"):
        write_qonnx(network, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
