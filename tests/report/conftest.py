import numpy as np
import pytest
import timm
import torch

from qsd.neurons import SpikeNeuron


def _made_up(model="qsd_tiny", time_steps=4, layers=12):
    """A record in the form of `qsd.report.record`, with a real model's names and numbers that nobody measured."""
    random = np.random.RandomState(0)
    with torch.device("meta"):
        network = timm.create_model(model, time_steps=time_steps)
    names = [name for name, module in network.named_modules() if isinstance(module, SpikeNeuron)][:layers]
    neurons = []
    for name in names:
        histogram = random.dirichlet([8] + [1] * time_steps).tolist()
        rate = sum(n * share for n, share in enumerate(histogram)) / time_steps
        neurons.append({"name": name, "size": 4096, "rate": rate, "histogram": histogram})
    operations = ["stem.downsample.proj", *(name.replace("neuron", "proj") for name in names), "head"]
    layers = []
    for i, name in enumerate(operations):
        kind = "stem" if i == 0 else "head" if name == "head" else "product" if "attn.attn" in name else "synapse"
        energy = random.exponential(0.02, 3)
        layers.append(
            {
                "name": name, "kind": kind, "spikes": 3e5, "rate": None if i == 0 else 0.2,
                "additions": {"merged": 4e7 * energy[0], "unmerged": 2e7 * energy[0]},
                "macs": {"merged": 0.0, "unmerged": 1e6, "integer": 5e6}, "zero_skipping": 3e6,
                "energy_mj": dict(zip(("merged", "unmerged", "papers", "integer"), [*energy, energy[0] * 0.7])),
            }
        )  # fmt: skip
    totals = {key: sum(layer["energy_mj"][key] for layer in layers) for key in layers[0]["energy_mj"]}
    lossless = time_steps - 1
    delays = [
        {"delay": d, "accuracy": 0.975 * (d + 1) / time_steps, "class_agreement": (d + 1) / time_steps,
         "latency": time_steps + 40 * d, "interval": time_steps + d}
        for d in range(time_steps)
    ]  # fmt: skip
    comparison = {
        "images": 200,
        "changed_images": 0,
        "equal_classes": 200,
        "equal_counts": True,
        "class_agreement": 1.0,
    }
    return {
        "qsd": "0.0", "left_out": [],
        "model": {"name": model, "checkpoint": "best.ckpt", "time_steps": time_steps, "weight_bits": "4"},
        "data": {"description": "200 validation images of DigitsData", "image_size": [1, 32, 32]},
        "conversion": {"merge": True, "merged_bits": None, "delay": None},
        "accuracy": {"images": 200, "float": 0.99, "quantized": 0.975, "spiking": 0.975, "class_agreement": 1.0,
                     "way": "count", "dtype": "float32"},
        "comparison": [
            {**comparison, "dtype": "float64", "way": "count", "farthest_first_difference": None},
            {**comparison, "dtype": "float64", "way": "simulate", "farthest_first_difference": None},
            {**comparison, "dtype": "float32", "way": "count", "changed_images": 3, "equal_counts": False,
             "equal_classes": 199, "class_agreement": 0.995, "farthest_first_difference": 2.1e-6},
        ],
        "delays": {"images": 100, "quantized_accuracy": 0.975, "rows": delays},
        "latency": {"steps": 211 if lossless else 1, "interval": 8},
        "neurons": neurons,
        "raster": {"name": names[-1], "neurons": 4096,
                   "spikes": (random.rand(8, time_steps, 48) < 0.15).astype(int).tolist()},
        "audit": {"images": 16, "spike_driven": True, "operations": [
            {"name": name, "operation": "product" if "attn.attn" in name else "convolution",
             "status": "integer" if "attn.attn" in name else "analog" if i == 0 else "binary",
             "bits": 12 if "attn.attn" in name else None, "stem": i == 0, "spike_driven": i > 0,
             "note": "sees the image" if i == 0 else ""}
            for i, name in enumerate(operations)
        ]},
        "energy": {"preset": "fp32", "mac_pj": 4.6, "ac_pj": 0.9, "images": 200, "bits": 3, "merged": True,
                   "layers": layers,
                   "total_mj": {**totals, "papers_stem_per_step": totals["papers"] * 1.1}},
        "sizes": {"parameters": 15.1e6, "float_bytes": 60.5e6, "packed_bytes": 7.7e6, "file_bytes": 7.8e6,
                  "converted_bytes": 147.6e6, "float_equivalents": 1.9e6},
    }  # fmt: skip


@pytest.fixture
def made_up_record():
    return _made_up
