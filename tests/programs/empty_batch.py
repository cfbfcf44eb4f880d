"""One training step of a detector in two processes, of which the second one has no box: gradients must agree.

It is started by torch.distributed.run, and prints how many parameters have gradients, and how many of them differ.
"""

import sys

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.detection import batch, build

dist.init_process_group("gloo")
rank = dist.get_rank()
model = build(sys.argv[1])
parallel = DistributedDataParallel(model, broadcast_buffers=False)
data = model.data_preprocessor(batch("boxes" if rank == 0 else "nothing"), training=True)
losses = parallel(**data, mode="loss")
total, _ = model.parse_losses(losses)
total.backward()
gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
assert all(bool(grad.isfinite().all()) for grad in gradients.values())
sums = torch.stack([grad.double().abs().sum() for grad in gradients.values()])
both = [torch.zeros_like(sums) for _ in range(2)]
dist.all_gather(both, sums)
if rank == 0:
    print("parameters", len(gradients), "different", int((both[0] != both[1]).sum()))
dist.destroy_process_group()
