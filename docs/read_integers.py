"""Read a folder of ``qsd export --format integers``, its only argument, and check the test vectors. It needs NumPy."""

import json
import sys
from pathlib import Path

import numpy as np


def load(folder):
    """The description and the arrays, as signed integers."""
    description, arrays = json.loads((Path(folder) / "network.json").read_text(encoding="utf-8")), {}
    with np.load(Path(folder) / "arrays.npz") as stored:
        for name, entry in description["arrays"].items():
            values = stored[name].astype(np.int64)
            if entry["packed"]:  # Two integers of 4 bits in a byte, the first one in the low half.
                values = np.stack([values & 15, values >> 4], 1).reshape(-1)[: int(np.prod(entry["shape"]))]
                values = (values ^ 8) - 8
            arrays[name] = values.reshape(entry["shape"])
    return description, arrays


def shift(x, places):
    """A right shift that rounds to the nearest integer, halves up."""
    return (x + (1 << (places - 1)) >> places) if places else x


def by_channel(values, x):
    """Values ``[C]`` as they multiply ``[C, ...]``."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def windows(x, layer):
    """The input ``[C, H', W']`` of every tap of a kernel."""
    top, bottom, left, right = layer["padding"]
    x = np.pad(x, [(0, 0), (top, bottom), (left, right)])
    (_, height, width), (down, across), (far, wide) = layer["shape"], layer["stride"], layer["dilation"]
    for i, j in np.ndindex(*layer["kernel"]):
        yield i, j, x[:, i * far :, j * wide :][:, : down * height : down, : across * width : across]


def convolve(layer, arrays, x):
    """A convolution of one image or step ``[C, H, W]``."""
    weight = arrays[layer["name"] + "/weight"]
    if layer["table_shift"] is not None:
        weight = shift(weight * by_channel(arrays[layer["name"] + "/multiplier"], weight), layer["table_shift"])
    groups, outputs, seen = layer["groups"], layer["shape"][0], weight.shape[1]
    total = np.zeros((groups, outputs // groups, np.prod(layer["shape"][1:])), np.int64)
    for i, j, tap in windows(x, layer):
        total += weight[:, :, i, j].reshape(groups, -1, seen) @ tap.reshape(groups, seen, -1)
    return total.reshape(layer["shape"])


def fire(layer, arrays, x):
    """The spikes of neurons whose membranes sum the currents ``[T, C, ...]``: charge in T steps, then fire in T."""
    membrane, thresholds = x.sum(0), arrays[layer["name"] + "/thresholds"]
    if layer["directed"]:
        membrane = membrane * by_channel(arrays[layer["name"] + "/direction"], membrane)
    return np.stack([membrane >= by_channel(thresholds[:, k], membrane) for k in range(len(x))]).astype(np.int64)


def step(layer, arrays, steps, *inputs):
    """The signal of a layer in all steps ``[T, ...]``."""
    kind, name, x, silent = layer["kind"], layer["name"], inputs[0], np.zeros((steps - 1, *layer["shape"]), np.int64)
    if kind == "pixels":
        return np.concatenate([[[row[image] for row, image in zip(arrays[name + "/table"], x)]], silent])
    if kind == "rescale":
        product = x.sum(0) * by_channel(arrays[name + "/multiplier"], x[0])
        return np.concatenate([silent, [shift(product, layer["shift"])]])
    if kind == "total":
        sums = x.sum((2, 3), keepdims=True)
        sums[0] += by_channel(arrays[name + "/bias"], sums[0]) if layer["biased"] else 0
        return sums
    return {
        "events": lambda: np.stack([x > t for t in range(steps)]).astype(np.int64),
        "convolution": lambda: np.stack([convolve(layer, arrays, image) for image in x]),
        "add": lambda: x + inputs[1],
        "neuron": lambda: fire(layer, arrays, x),
        "max_pool": lambda: np.stack([np.max([tap for *_, tap in windows(image, layer)], 0) for image in x]),
        "product": lambda: np.diff(np.cumsum(x, 0) @ np.cumsum(inputs[1], 0), axis=0, prepend=0),  # Its growth.
        "query": lambda: x.sum(0) @ inputs[1],
        "reshape": lambda: x.reshape(steps, *layer["shape"]),
        "permute": lambda: x.transpose(0, *[axis + 1 for axis in layer.get("axes", [])]),
    }[kind]()


if __name__ == "__main__":
    description, arrays = load(sys.argv[1])
    network, vectors = description["network"], np.load(Path(sys.argv[1]) / "vectors.npz")
    for number, pixels in enumerate(vectors["pixels"]):
        signals = {}
        for layer in network["layers"]:
            name, inputs = layer["name"], [signals[name] for name in layer["inputs"]] or [pixels]
            signals[name] = step(layer, arrays, network["time_steps"], *inputs)
            if "spikes/" + name in vectors:
                spikes = np.packbits(signals[name].reshape(network["time_steps"], -1).astype(bool), axis=1)
                assert (spikes == vectors["spikes/" + name][number]).all(), f"image {number}: {name} differs"
        output = signals[network["output"]].sum(0).reshape(-1)
        assert (output == vectors["output"][number]).all(), f"image {number}: the output differs"
        print(f"image {number}: class {output.argmax()}, all spikes as expected")
