"""The page on attention: of one network and of several, spiking or float, with and without a teacher."""

import json
import re
from html import unescape

import pytest
import timm
import torch

from qsd import QsdError
from qsd.distillation import Teacher
from qsd.information import measure_information
from qsd.report.attention import attention_html, attention_record, findings, network_record

SMALL = {"embed_dims": (8, 8, 16, 8), "num_heads": 2, "depth": 4, "strides": (1, 2, 2, 2, 1), "in_chans": 1}


def measured(label, teacher=None, name="qsd_tiny", **arguments):
    torch.manual_seed(0)
    network = timm.create_model(name, **{**SMALL, **arguments})
    information = measure_information(network, [(torch.randn(4, 1, 32, 32), torch.arange(4))], teacher)
    return network_record(
        label, information, model=name, time_steps=network.time_steps, weight_bits=network.weight_bits, checkpoint="x"
    )


@pytest.fixture(scope="module")
def teacher():
    return Teacher(timm.create_model("qsd_tiny_ann", **SMALL), "twin")


@pytest.fixture(scope="module")
def several(teacher):
    networks = [
        measured("binary", teacher, time_steps=1),
        measured("multi-level & <new>", teacher, time_steps=4),
        measured("float twin", teacher, "qsd_tiny_ann"),
    ]
    return attention_record(networks, "test images", "twin.ckpt")


def test_networks_stand_side_by_side_with_all_figures_and_numbers(several):
    page = attention_html(several)
    assert "multi-level &amp; &lt;new&gt;" in page
    assert "<new>" not in page
    alts = [unescape(alt) for alt in re.findall(r'alt="([^"]*)"', page)]
    for words in (
        "entropy of the counts", "variance kept", "information kept", "spikes per neuron", "silent heads",
        "distance to the teacher", "Distributions of the membranes", "spike count and layer: binary",
    ):  # fmt: skip
        assert any(words in alt for alt in alts), words
    assert not any("spike count and layer: float twin" in alt for alt in alts)  # it has no counts
    assert page.count('<img src="data:image/svg+xml;base64,') == len(alts)
    # a row of each network for every query, key and value of four layers, beside the first table's
    assert page.count("<td>stages.") == 3 * 4 * 3
    assert "://" not in re.sub(r'src="[^"]*"', "", page)
    assert "<script" not in page


def test_findings_give_the_means_that_the_signals_have(several):
    said = {finding.title: finding.text for finding in findings(several)}
    for network in several["networks"][:2]:
        mean = sum(s["entropy"] for s in network["signals"]) / len(network["signals"])
        assert f"{network['label']}: {mean:.2f} of at most" in said["Entropy of the spike counts,"]
    distances = said["Distance to the teacher's token similarities,"]
    assert "float twin: " in distances
    json.dumps(several, allow_nan=False)


def test_one_network_without_a_teacher_has_a_page_of_its_own():
    record = attention_record([measured("alone")], "test images", None)
    page = attention_html(record)
    assert "teacher's similarity" not in page
    assert "alone:" not in " ".join(finding.text for finding in findings(record))


def test_silent_heads_are_bad_news():
    network = measured("quiet")
    for i, signal in enumerate(network["signals"]):
        signal["silent_heads"] = 0.0 if i else 0.9
    bad = [f.text for f in findings(attention_record([network], "images", None)) if f.kind == "bad"]
    assert bad == ["in quiet, more than half of the heads and images at stages.2.blocks.0.query."]


def test_a_float_network_alone_has_membranes_only():
    record = attention_record([measured("float", name="qsd_tiny_ann")], "images", None)
    assert 'id="membranes"' in attention_html(record)
    assert 'id="information"' not in attention_html(record)


def test_networks_of_other_layers_or_too_many_are_refused():
    with pytest.raises(QsdError, match="shallow has other attention layers than deep; analyse them apart"):
        attention_record([measured("deep"), measured("shallow", depth=2)], "images", None)
    with pytest.raises(QsdError, match="5 networks: one to 4"):
        attention_record([measured("x")] * 5, "images", None)
