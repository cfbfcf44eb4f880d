"""Pictures of where a network fires: their numbers, and their files."""

import json

import pytest
import torch
from PIL import Image

from qsd import QsdError, to_spike_driven
from qsd.report.activity import FILES, write_activity
from qsd.spiking.activity import measure_activity, stage_of
from tests.helpers.networks import dense_network


def test_layers_belong_to_stages():
    names = {
        "backbone.model.stages.2.blocks.0.neuron": "stages.2", "backbone.model.stem.neuron": "stem",
        "stages.2.blocks.0.attn.q_neuron": "stages.2",
        "blocks.3.mlp.neuron1": "blocks.3", "stem.blocks.0.neuron": "stem", "head_neuron": "head_neuron",
        "bbox_head.cls_convs.0.neuron@2": "bbox_head",
    }  # fmt: skip
    assert {name: stage_of(name) for name in names} == names


def test_rates_attention_and_time_are_those_of_the_spikes(tmp_path):
    torch.manual_seed(0)
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    for name, sizes in (("qsd_tiny", {}), ("csdformer_4_256", {"depth": 1})):
        spiking = to_spike_driven(dense_network(name, **sizes))
        trace = spiking.simulate(image, record="*")
        activity = measure_activity(spiking, image)
        stages = {stage_of(call) for call in trace.counts}
        assert set(activity.over_time) == stages
        for stage in stages:
            found = {call: count for call, count in trace.counts.items() if stage_of(call) == stage}
            cells, spikes = (
                sum(f(c) for c in found.values()) for f in (torch.numel, lambda c: c.double().sum().item())
            )
            assert sum(activity.over_time[stage]) * cells == pytest.approx(spikes)
            assert len(activity.over_time[stage]) == trace.latency
            last = max(step for step, value in enumerate(activity.over_time[stage]) if value)
            assert last < trace.latency
            if stage in activity.rates:
                maps = [c.double().mean() / 4 for call, c in found.items() if c.dim() == 4 and "score" not in call]
                assert activity.rates[stage].mean() == pytest.approx(float(sum(maps) / len(maps)))
        with pytest.raises(QsdError, match="2 images"):
            measure_activity(spiking, torch.cat([image, image]))
        for layer, matrix in activity.matrices.items():
            counts = trace.counts[f"{layer}.score_neuron"][0].double()
            assert matrix[1, 2] == pytest.approx(float(counts[:, 1, 2].mean() / 4))
            received = activity.received[layer]
            assert received.flatten()[2] == pytest.approx(float(counts[:, :, 2].mean() / 4))
            assert received.shape == trace.counts[f"{layer}.q_neuron"].shape[2:]
        for layer, response in activity.responses.items():
            assert torch.equal(response, trace.counts[f"{layer}.attn_neuron"][0].double().mean(0) / 4)
        assert bool(activity.matrices) == name.startswith("csd")
        assert bool(activity.responses) == name.startswith("qsd")

    facts = {"model": name, "image": "<b>.png", "time_steps": 4}
    written = write_activity(activity, image[0], tmp_path / name, facts)
    assert {path.name for path in written} >= set(FILES)
    assert (tmp_path / name / "matrices.png").is_file()
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.verify()
    page = (tmp_path / name / "activity.html").read_text()
    assert page.count("<img ") == len(written) - 2
    assert "<b>.png" not in page
    record = json.loads((tmp_path / name / "activity.json").read_text())
    assert record["over_time"] == activity.over_time
