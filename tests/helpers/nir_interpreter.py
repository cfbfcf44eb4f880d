"""A plain interpreter of NIR graphs, with the neurons that the schedule asks for."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

nir = pytest.importorskip("nir")


def order(graph):
    """Names of the nodes, each after all of its sources."""
    sources = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    done = []
    while len(done) < len(sources):
        done += [name for name, needed in sources.items() if name not in done and all(n in done for n in needed)]
    return done, sources


def numbers(values):
    return tuple(int(v) for v in np.broadcast_to(values, 2))


def evaluate(node, x):
    if isinstance(node, nir.Conv2d):
        weight, bias = (torch.from_numpy(v).to(x) for v in (node.weight, node.bias))
        assert not bias.any()  # It would act in every step.
        return F.conv2d(x, weight, None, numbers(node.stride), numbers(node.padding), 1, int(node.groups))
    if isinstance(node, nir.Linear):
        return F.linear(x, torch.from_numpy(node.weight).to(x))
    if isinstance(node, nir.SumPool2d):
        size = numbers(node.kernel_size)
        return F.avg_pool2d(x, size, numbers(node.stride), numbers(node.padding), divisor_override=1)
    if isinstance(node, nir.AvgPool2d):
        return F.avg_pool2d(x, numbers(node.kernel_size), numbers(node.stride), numbers(node.padding))
    if isinstance(node, nir.Flatten):
        return x.flatten(1)
    assert isinstance(node, nir.Threshold | nir.Output), node
    return (x > torch.from_numpy(node.threshold).to(x)).to(x) if isinstance(node, nir.Threshold) else x


def simulate(path, images):
    """Outputs summed over all steps, and the spike counts of every neuron; soft reset, no floor of the membrane."""
    graph, schedule = nir.read(path), json.loads((path.parent / f"{path.name}.json").read_text())
    names, sources = order(graph)
    membranes, counts = {}, {}
    for step in range(1, schedule["steps"] + 1):
        values = {}
        for name in names:
            node = graph.nodes[name]
            if name == "image":
                values[name] = images * (step <= schedule["time_steps"])
            elif name in schedule["clocks"]:
                clock = schedule["clocks"][name]
                feed = images.new_zeros(tuple(node.input_type["input"]))
                feed[0] = clock["pulses"].get(str(step), 0)
                if step == 1:
                    start = torch.tensor(clock["start"])
                    for k in range(len(feed) - 1):
                        feed[1 + k] = start == k
                values[name] = feed.expand(len(images), *feed.shape)
            else:
                x = sum(values[source] for source in sources[name])
                if isinstance(node, nir.IF | nir.I):
                    x = membranes[name] = membranes.get(name, 0) + x
                if isinstance(node, nir.IF):
                    values[name] = (x > torch.from_numpy(node.v_threshold).to(x)).to(x)
                    membranes[name] = x - values[name] * torch.from_numpy(node.v_threshold).to(x)
                    counts[name] = counts.get(name, 0) + values[name]
                else:
                    values[name] = x if isinstance(node, nir.I) else evaluate(node, x)
    return values["output"], counts
