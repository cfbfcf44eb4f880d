"""A training of mmengine in two processes that is stopped between two optimizer steps and goes on.

python -m torch.distributed.run --nproc_per_node=2 accumulate_in_two.py FOLDER
"""

import sys
from pathlib import Path

import pytest
import torch

from qsd.mm.checkpoints import read_mm_checkpoint
from tests.mm.test_interruptions import Send, train

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    options = {"accumulate": 3, "batch": 1, "count": 8, "launcher": "pytorch"}
    whole = train(folder / "whole", **options).model.module
    with pytest.raises(SystemExit):
        train(folder / "stopped", *([Send(1)] if torch.distributed.get_rank() == 0 else []), **options)
    torch.distributed.barrier()
    checkpoint = folder / "stopped" / "interrupted.pth"
    resumed = train(folder / "stopped", resume=checkpoint, **options).model.module
    assert resumed.seen == whole.seen[2:]
    torch.testing.assert_close(resumed.layer.weight, whole.layer.weight, rtol=1e-6, atol=0)
    assert read_mm_checkpoint(checkpoint)["accumulated_gradients"]["layer.weight"].abs() > 0
    torch.distributed.destroy_process_group()
