"""Small networks with the statistics of a training, and the comparison of their three ways to count spikes."""

import random

import timm
import torch
from torch import nn

from qsd.models.variants import family_of
from qsd.neurons import LsqNeuron
from qsd.spiking import count_spikes
from tests.helpers import sample

FAMILIES = ["qsd_*", "csdformer_*", "e_spikeformer_*"]
# Every registered network, and those among them that fire spikes.
ALL_NAMES = timm.list_models(FAMILIES)
NAMES = [name for name in ALL_NAMES if not name.endswith("_ann")]
SMALL = {"embed_dims": (8, 8, 16, 24), "num_heads": 4, "depth": 4, "num_classes": 5, "layer_scale": 0.5}
SMALL_CSD = {"embed_dims": 32, "num_heads": 4, "depth": 2, "num_classes": 5}
SMALL_ESF = {"embed_dims": (8, 8, 16, 24), "num_heads": 4, "depth": 4, "num_classes": 5}
SMALL_LARGE = {"embed_dims": (8, 8, 24), "num_heads": 4, "depth": 2, "num_classes": 5, "layer_scale": 0.5}


def small(name, **kwargs):
    """A registered model with few channels and blocks."""
    return timm.create_model(name, **{**small_sizes(name), **kwargs})


def small_sizes(name):
    """The arguments that shrink a registered model."""
    if name.startswith("e_spikeformer"):
        return SMALL_LARGE if name.startswith(("e_spikeformer_83m", "e_spikeformer_171m")) else SMALL_ESF
    return SMALL if name.startswith("qsd") else SMALL_CSD


def sampled(names):
    """Of the sizes of a family that are one network when shrunk, the first; all in ``make test-long``."""
    kinds = {}
    for name in names:
        family, shrunk = family_of(name), small_sizes(name)
        sizes = family.sizes[name.removesuffix("_ann")].items()
        left = tuple((key, value) for key, value in sizes if key not in shrunk)
        kinds.setdefault((family.title, name.endswith("_ann"), left), name)
    return sample(list(kinds.values()), names)


def randomize_norms(model, mean=(0.0, 1.0), var=(0.5, 2.0), weight=(0.5, 1.5), bias=(0.0, 1.0)):
    """Give batch norms statistics and affine parameters that a mistake would show in.

    ``mean`` and ``bias`` are the mean and deviation of a normal distribution, ``var`` and ``weight`` the bounds of a
    uniform one; ``weight`` and ``bias`` may be ``None``, which leaves them alone.
    """
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(*mean)
            norm.running_var.uniform_(*var)
            if weight is not None:
                norm.weight.data.uniform_(*weight)
            if bias is not None:
                norm.bias.data.normal_(*bias)
    return model


def randomize_steps(model, low, high):
    """Multiply step sizes by factors between two bounds, so that none is a round number."""
    for module in model.modules():
        if hasattr(module, "step"):
            module.step.data.mul_(torch.empty_like(module.step).uniform_(low, high))
    return model


def dense_network(name="qsd_tiny", **kwargs):
    """A shrunk model in evaluation whose statistics make neurons fire at about half their capacity."""
    model = small(name, **kwargs).double().eval()
    # E-SpikeFormer's thresholds are one for any T, four times those of the others at T = 4.
    bias, largest = (0.2, 0.3), max(1, kwargs.get("time_steps", 4) / 4)
    if name.startswith("e_spikeformer"):
        bias = (0.9 * largest, 0.5 * largest)
    randomize_norms(model, mean=(0, 0.3), var=(0.3, 1), bias=bias)
    randomize_steps(model, 0.7, 1.3)
    # Learned steps by their inputs in evaluation, some larger, some smaller.
    neurons = [module for module in model.modules() if isinstance(module, LsqNeuron)]
    handles = [
        n.register_forward_pre_hook(lambda m, i: m.initialize(i[0] * random.uniform(0.4, 0.8), *i[1:])) for n in neurons
    ]
    if neurons:
        model(torch.randn(2, model.in_chans, 32, 32, dtype=torch.float64))
    for handle in handles:
        handle.remove()
    return model


def assert_same_counts(model, spiking, images):
    """The trained network, the count domain and steps of binary spikes agree, neuron by neuron."""
    trained, counted, stepped = count_spikes(model, images), count_spikes(spiking, images), {}
    with spiking.runtime.counting(stepped):
        trace = spiking.simulate(images)
    assert trained.keys() == counted.keys() == stepped.keys()
    for name, counts in trained.items():
        assert torch.equal(counts, counted[name]), name
        assert torch.equal(counts, stepped[name]), name
    torch.testing.assert_close(trace.logits, model(images), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(spiking(images), model(images), rtol=1e-10, atol=1e-12)
    mean = sum(c.mean() for c in trained.values()) / len(trained) / spiking.time_steps
    assert 0.1 < mean < 0.9, "silent or saturated neurons would prove nothing"
