import numpy as np
import pytest
import timm
import torch

from qsd.energy import preset_prices
from qsd.neurons import SpikeNeuron
from qsd.report import Record, costs, record
from qsd.report.activity_record import ActivityRecord
from qsd.report.costs import EnergyColumns
from qsd.spiking.layers.movement import FLOWS, NETWORKS


def _made_up(model="qsd_tiny", time_steps=4, layers=12):
    """A record with a real model's names and numbers that nobody measured."""
    random = np.random.RandomState(0)
    with torch.device("meta"):
        network = timm.create_model(model, time_steps=time_steps)
    names = [name for name, module in network.named_modules() if isinstance(module, SpikeNeuron)][:layers]
    neurons = []
    for name in names:
        histogram = random.dirichlet([8] + [1] * time_steps).tolist()
        rate = sum(n * share for n, share in enumerate(histogram)) / time_steps
        neurons.append(record.NeuronActivity(name=name, size=4096, rate=rate, histogram=histogram))
    operations = ["stem.downsample.proj", *(name.replace("neuron", "proj") for name in names), "head"]
    layers = [_layer(random, name, i, i == 0 or len(operations) > 6) for i, name in enumerate(operations)]
    columns = EnergyColumns.model_fields
    totals = {key: sum(getattr(layer.energy_mj, key) for layer in layers) for key in columns}
    return Record(
        qsd="0.0",
        left_out=[],
        model=record.ModelFacts(name=model, checkpoint="best.ckpt", time_steps=time_steps, weight_bits="4"),
        data=record.Data(description="200 validation images of DigitsData", image_size=[1, 32, 32]),
        conversion=record.Settings(merge="all", merged_bits=None, delay=None),
        accuracy=record.ClassifierAccuracy(
            images=200, float_twin=0.99, quantized=0.975, spiking=0.975, class_agreement=1.0, way="count",
            dtype="float32",
        ),
        comparison=[
            _compared(dtype="float64", way="count"),
            _compared(dtype="float64", way="simulate"),
            _compared(dtype="float32", way="count", changed_images=3, equal_counts=False, equal_classes=199,
                      class_agreement=0.995, farthest_first_difference=2.1e-6),
        ],
        delays=_delays(time_steps),
        latency=record.Latency(steps=211 if time_steps > 1 else 1, interval=8),
        neurons=neurons,
        raster=record.Raster(
            name=names[-1], neurons=4096, spikes=(random.rand(8, time_steps, 48) < 0.15).astype(int).tolist()
        ),
        audit=record.AuditRecord(
            images=16, spike_driven=True, operations=[_operation(name, i) for i, name in enumerate(operations)]
        ),
        energy=costs.EnergyRecord(
            preset="fp32", mac_pj=4.6, ac_pj=0.9, time_steps=time_steps, merged=True, bits=3, images=200, layers=layers,
            total_mj=costs.EnergyTotals(**totals, papers_stem_per_step=totals["papers"] * 1.1),
            codes=[
                costs.CodeCost(code="unary", steps=4, spikes=9e5, additions=4e7, shifts=0.0, energy_mj=0.05),
                costs.CodeCost(code="binary", steps=3, spikes=7e5, additions=3e7, shifts=3e7, energy_mj=0.04),
            ],
            **_memory(layers),
        ),
        sizes=costs.Sizes(
            parameters=15_100_000, float_bytes=60_500_000, packed_bytes=7_700_000, file_bytes=7_800_000,
            converted_bytes=147_600_000, float_equivalents=1.9e6,
        ),
        segments=[],
        activity=_activity(random),
    )  # fmt: skip


def _memory(layers):
    """Totals of memory, prices and NeuroBench's metrics."""
    merged = sum(layer.energy_mj.merged for layer in layers)
    found = costs.WithMemory(arithmetic=merged, memory=[3 * merged, 4 * merged], total=[4 * merged, 5 * merged])
    operations = costs.SynapticOperations(Effective_MACs=1e7, Effective_ACs=2e9, Dense=5.9e10)
    metrics = costs.NeuroBenchMetrics(
        footprint=7.6e6, connection_sparsity=0.11, activation_sparsity=0.83, synaptic_operations=operations,
        membrane_updates=4.2e7,
    )  # fmt: skip
    return {"with_memory_mj": _by_network(found), "prices": preset_prices("fp32"), "neurobench": metrics}


def _activity(random):
    """Pictures of an image."""
    maps = {"stage": random.rand(2, 2).round(3).tolist()}
    return ActivityRecord(
        image=random.rand(2, 2).round(3).tolist(), rates=maps, responses={"attn": maps["stage"]}, received={},
        over_time={"stage": random.rand(3).tolist()}, latency=3,
    )  # fmt: skip


def _by_network(value):
    flows = dict.fromkeys(FLOWS, value)
    return dict.fromkeys(NETWORKS, flows)


def _traffic(random, energy):
    return {
        "moved": _by_network(_moved(random)),
        "arithmetic_mj": _by_network(energy),
        "memory_mj": _by_network([3 * energy, 4 * energy]),
        "break_even": {"arithmetic": 0.14, "events": 0.0, "reuse": None},
    }


def _layer(random, name, i, memory):
    kind = "stem" if i == 0 else "head" if name == "head" else "product" if "attn.attn" in name else "synapse"
    merged, unmerged, papers = random.exponential(0.02, 3).tolist()
    return costs.EnergyLayer(
        name=name,
        kind=kind,
        spikes=3e5,
        rate=None if i == 0 else 0.2,
        additions=costs.MergedAndUnmerged(merged=4e7 * merged, unmerged=2e7 * merged),
        macs=costs.Multiplications(merged=0.0, unmerged=1e6, integer=5e6),
        zero_skipping=3e6,
        energy_mj=EnergyColumns(
            merged=merged, unmerged=unmerged, papers=papers, integer=merged * 0.7, float_twin=merged, lemaire=9 * merged
        ),
        **(_traffic(random, merged) if memory else {}),
    )


def _moved(random):
    return costs.MovedBits(**dict(zip(costs.MovedBits.model_fields, (1e8 * random.rand(5)).tolist())))


def _operation(name, i):
    product = "attn.attn" in name
    return record.AuditedOperation(
        name=name,
        operation="product" if product else "convolution",
        status="integer" if product else "analog" if i == 0 else "binary",
        bits=12 if product else None,
        stem=i == 0,
        spike_driven=i > 0,
        note="sees the image" if i == 0 else "",
    )


def _compared(**changes):
    lossless = {"images": 200, "changed_images": 0, "equal_classes": 200, "equal_counts": True, "class_agreement": 1.0}
    return record.ComparedCounts(**{**lossless, "farthest_first_difference": None, **changes})


def _delays(time_steps):
    rows = [
        record.DelayRow(
            delay=d, accuracy=0.975 * (d + 1) / time_steps, class_agreement=(d + 1) / time_steps,
            latency=time_steps + 40 * d, interval=time_steps + d,
        )
        for d in range(time_steps)
    ]  # fmt: skip
    return record.Delays(images=100, quantized_accuracy=0.975, rows=rows)


@pytest.fixture(scope="session")
def made_up_record():
    return _made_up


@pytest.fixture(scope="session")
def made_up_record_once():
    return _made_up(layers=2).to_dict()
