"""Small networks to export."""

import copy
from functools import cache

import timm
import torch

import qsd
from qsd.layers import LayerScale

QSD = ("qsd_tiny", {"embed_dims": (8, 16, 16, 16), "depth": 2, "num_heads": 2, "strides": (2, 2, 1, 2, 1)})
CSD = ("csdformer_4_256", {"embed_dims": 32, "depth": 1, "num_heads": 2, "weight_bits": 4})
ESF_SIZES = {"embed_dims": (8, 8, 16, 16), "depth": 2, "num_heads": 4, "strides": (2, 2, 1, 2, 1), "weight_bits": 4}
ESF = ("e_spikeformer_tiny", ESF_SIZES)


def spiking_network(name, sizes, part=None, double=False, **options):
    """With statistics, biases and layer scales that make every layer matter."""
    model, images = copy.deepcopy(_trained(name, tuple(sizes.items())))
    model = model if part is None else model.get_submodule(part)
    model = model.double() if double else model
    return qsd.to_spike_driven(model, **options), images


@cache
def _trained(name, sizes):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **dict(sizes)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # The statistics are means over the batches, of which a few are enough.
            torch.nn.init.normal_(module.weight, 1, 0.3)
            torch.nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, LayerScale):
            torch.nn.init.constant_(module.gamma, 0.5)
    images = torch.randn(16, 3, 32, 32)
    qsd.initialize_neurons(model, images)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 32, 32))
    return model.eval(), images


def run_onnx(path, images, suffix=".time_steps"):
    """Logits, and every neuron's counts by its name: what is clipped to at most T."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    clips = [node for node in model.graph.node if node.op_type == "Clip" and node.input[2].endswith(suffix)]
    for node in clips:
        model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.UINT8, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits, *counts = session.run(None, {"images": images.numpy()})
    return logits, {node.input[2].removesuffix(suffix): count for node, count in zip(clips, counts)}
