"""Memory-lean training with synchronised norms in two processes: the gradients of one process with all images.

python -m torch.distributed.run --nproc_per_node=2 synchronised_norms.py [DEVICE]

Both processes compute on the same device.
"""

import copy
import sys

import torch
from torch import distributed, nn

from qsd import set_lean
from qsd.layers import conv_norm, rep_conv
from qsd.neurons import LsqNeuron, SpikeNeuron
from tests.lean.test_synchronised_norms import trained

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    layers = [conv_norm(4, 4, 1), LsqNeuron(4), rep_conv(4), SpikeNeuron(4), rep_conv(4, layer_scale=0.5)]
    model = nn.Sequential(*layers).double().train()
    images = torch.randn(5, 4, 6, 5, dtype=torch.float64)
    whole = copy.deepcopy(model)
    set_lean(whole, False)
    cotangent = torch.randn_like(copy.deepcopy(model)(images))
    output, images_grad, gradients, buffers = trained(whole, images, cotangent)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    set_lean(shared, True)
    own = trained(shared, images.split([2, 3])[rank], cotangent.split([2, 3])[rank])
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(own[0], output.split([2, 3])[rank], **close)
    torch.testing.assert_close(own[1], images_grad.split([2, 3])[rank], **close)
    for part, expected in zip(own[2], gradients, strict=True):
        distributed.all_reduce(part)
        torch.testing.assert_close(part, expected, **close)
    for part, expected in zip(own[3], buffers, strict=True):
        torch.testing.assert_close(part, expected, **close)
    if images.is_cuda:  # PyTorch refuses such norms in its own module on processors; it takes the mean of the gradients
        shared.zero_grad()
        parallel = nn.parallel.DistributedDataParallel(shared)
        (parallel(images.split([2, 3])[rank]) * cotangent.split([2, 3])[rank]).sum().backward()
        for parameter, expected in zip(parallel.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad * 2, expected, **close)
    distributed.destroy_process_group()
